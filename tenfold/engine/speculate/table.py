"""What `EngineConfig.speculate` names: nothing, n-gram lookup, or a draft model."""

from tenfold.base.config import EngineConfig
from tenfold.cache.store import KVStore
from tenfold.engine.memory import draft_spec
from tenfold.engine.runner import Runner
from tenfold.engine.speculate.draft import DraftModel
from tenfold.engine.speculate.ngram import NGrams
from tenfold.engine.speculate.policy import Policy
from tenfold.engine.speculate.speculator import Drafter, Speculator
from tenfold.models.table import Model


def make_speculator(
    config: EngineConfig, draft: Model | None, runner: Runner, kv: KVStore, max_len: int
) -> Speculator | None:
    """None where nothing is to be guessed. draft: the model that is named; kv: of the target. Raises ValueError where
    a name has no model.
    """
    policy = Policy()
    drafter: Drafter
    if not config.speculate:
        return None
    if config.speculate == "ngram":
        drafter = NGrams()
    elif draft is None:
        raise ValueError(f"speculate is {config.speculate!r}, but no such model was given; use '' or 'ngram'.")
    else:
        drafter = DraftModel(
            draft,
            draft_spec(draft.config, config),
            kv.pages,
            runner.model.config.vocab_size,
            runner.rows,
            config.max_step_tokens,
            config.speculate_tokens,
            min(max_len, draft.config.max_positions),
            policy.draft,
        )
    return Speculator(drafter, config.speculate_tokens, policy)
