"""Train a small mixture-of-experts model, to judge quantisers on a model that really learned something.

    python examples/train_moe.py prepare --out data TEXTS...       # a tokenizer, and the texts as token ids
    python examples/train_moe.py train --data data --out moe       # minutes on a GPU; needs transformers
    python examples/train_moe.py texts --data data --out texts     # to measure losses on, and to judge on

The model has the shape of Qwen2-MoE: 32 experts a layer of which a token goes to 4, and one for every token. Little is
done against uneven routing, so experts differ as much as a text makes them. Texts may be .txt, .rst, .md and .html
files, .gz of these, and folders; one document in fifty is held out.
"""

import argparse
import gzip
import json
import math
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

KINDS = (".txt", ".rst", ".md", ".html")
HELD_OUT = 50  # every so many documents
REPEATED = 13  # tokens in a row that two documents share
MOST_KNOWN = 0.2  # of a judged document's
VOCABULARY = 8192
END = "<|end|>"
SHAPE = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 1024,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.0005,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


class Words(HTMLParser):
    """The text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.found.append(data)


def documents(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        if path.is_dir():
            yield from documents(sorted(p for p in path.rglob("*") if p.is_file()))
            continue
        name = path.name.removesuffix(".gz")
        if not name.endswith(KINDS):
            continue
        raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        text = raw.decode("utf-8", errors="ignore")
        if name.endswith(".html"):
            page = Words()
            page.feed(text)
            text = "".join(page.found)
        if len(text) > 200:
            yield text


def prepare(paths: list[Path], out: Path, most: int) -> None:
    """A byte-level tokenizer trained on the texts, and train.bin and held_out.bin, uint16."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts, size = [], 0
    for text in documents(paths):
        texts.append(text)
        size += len(text)
        if size > most:
            break
    if size < 1_000_000:
        raise SystemExit(f"The texts have {size} characters together; give at least a million.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts[:: max(1, len(texts) // 4000)], trainer)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    parts: dict[str, list[np.ndarray]] = {"train": [], "held_out": []}
    for i in range(0, len(texts), 256):
        for j, encoded in enumerate(tokenizer.encode_batch(texts[i : i + 256]), i):
            ids = np.array([*encoded.ids, 0], dtype=np.uint16)
            parts["held_out" if j % HELD_OUT == 0 else "train"].append(ids)
    for name, found in parts.items():
        whole = np.concatenate(found)
        whole.tofile(out / f"{name}.bin")
        print(f"{name}: {len(found)} documents, {len(whole)} tokens")


def sequences(tokens: np.ndarray) -> np.ndarray:
    """A number for each REPEATED tokens in a row, the same for the same ones."""
    count = len(tokens) - REPEATED + 1
    found = np.zeros(max(0, count), np.uint64)
    for i in range(REPEATED if count > 0 else 0):
        found = found * np.uint64(1_000_003) + tokens[i : i + count].astype(np.uint64)
    return found


def seen(own: np.ndarray, known: np.ndarray) -> float:
    """The share of `own` that is in `known`, which is sorted."""
    places = np.searchsorted(known, own).clip(max=len(known) - 1)
    return float((known[places] == own).mean())


def split(tokens: np.ndarray) -> list[np.ndarray]:
    """Documents without the token that ends them."""
    return [part[part != 0] for part in np.split(tokens, np.flatnonzero(tokens == 0))][:-1]


def texts(data: Path, out: Path) -> None:
    """calibrate.txt, one document in HELD_OUT of those trained on, and judge.txt, held-out ones that say little of what
    is in those: copies of a document under another name are none that the model has not seen.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    trained, held = (np.fromfile(data / f"{name}.bin", dtype=np.uint16) for name in ("train", "held_out"))
    known = np.unique(sequences(trained))
    new = [d for d in split(held) if len(d) > 20 and seen(sequences(d), known) < MOST_KNOWN]
    out.mkdir(parents=True, exist_ok=True)
    for name, found in (("calibrate", split(trained)[HELD_OUT // 2 :: HELD_OUT]), ("judge", new)):
        (out / f"{name}.txt").write_text("\n\n".join(tokenizer.decode(d.tolist()) for d in found), encoding="utf-8")
        print(f"{name}: {len(found)} documents, {sum(map(len, found))} tokens")


def train(
    data: Path,
    out: Path,
    minutes: float,
    batch: int,
    length: int,
    rate: float,
    seed: int,
    experts: str,
    shape: dict[str, Any],
) -> None:
    """On a GPU in bfloat16 beside float32 weights, where experts run as transformers' `experts` implementation."""
    import torch
    import transformers

    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, held = (np.fromfile(data / f"{name}.bin", dtype=np.uint16) for name in ("train", "held_out"))
    vocabulary = json.loads((data / "tokenizer.json").read_text())["model"]["vocab"]
    config = transformers.Qwen2MoeConfig(
        **shape, vocab_size=len(vocabulary), bos_token_id=0, eos_token_id=0, pad_token_id=0, output_router_logits=True
    )
    model = transformers.Qwen2MoeForCausalLM(config).to(device)
    own = list(model.parameters())
    exact = [p.detach().clone() for p in own]  # what the optimizer moves, in float32
    if device == "cuda":
        model.set_experts_implementation(experts)
        for p in own:
            p.data = p.data.to(torch.bfloat16)
    count = sum(p.numel() for p in own)
    print(f"{count / 1e6:.1f} million parameters, {len(tokens) / 1e6:.1f} million tokens, on {device}", flush=True)
    decayed = [p for p in exact if p.dim() > 1]
    rest = [p for p in exact if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=device == "cuda")
    draw = np.random.default_rng(seed)
    begin, step, seen = time.monotonic(), 0, 0
    model.train()
    while (done := (time.monotonic() - begin) / (60 * minutes)) < 1:
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        starts = draw.integers(0, len(tokens) - length - 1, batch)
        ids = torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(np.int64)).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for master, p in zip(exact, own):
            master.grad = p.grad.float()
        torch.nn.utils.clip_grad_norm_(exact, 1.0)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(own, exact)
        step, seen = step + 1, seen + ids.numel()
        if step % 50 == 0 or step < 4:
            print(
                f"{time.monotonic() - begin:6.0f} s  step {step:5}  {seen / 1e6:7.2f} M tokens  loss {loss:.3f}",
                flush=True,
            )
    model.eval()
    windows = np.stack(np.array_split(held[: len(held) // length * length], len(held) // length))[:64].astype(np.int64)
    losses = []
    with torch.inference_mode():
        for window in torch.from_numpy(windows).to(device).split(8):
            logits = model(input_ids=window).logits[:, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).item())
    perplexity = math.exp(sum(losses) / len(losses))
    print(f"{step} steps, {seen / 1e6:.1f} million tokens; perplexity of held-out text {perplexity:.2f}")
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "tokenizer.json").write_text((data / "tokenizer.json").read_text())
    (out / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END})
    )
    card = {"steps": step, "tokens": seen, "held_out_perplexity": perplexity, "seed": seed, "parameters": count}
    (out / "training.json").write_text(json.dumps(card, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("texts", nargs="+", type=Path)
    preparing.add_argument("--out", type=Path, required=True)
    preparing.add_argument("--most", type=int, default=60_000_000, help="characters")
    writing = commands.add_parser("texts")
    writing.add_argument("--data", type=Path, required=True)
    writing.add_argument("--out", type=Path, required=True)
    training = commands.add_parser("train")
    training.add_argument("--data", type=Path, required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--minutes", type=float, default=5.0)
    training.add_argument("--batch", type=int, default=64)
    training.add_argument("--length", type=int, default=512)
    training.add_argument("--rate", type=float, default=2e-3)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--experts", default="grouped_mm", help="on a GPU: or eager, batched_mm")
    training.add_argument("--shape", default="{}", help="JSON: what differs from the usual shape")
    given = parser.parse_args()
    if given.command == "prepare":
        prepare(given.texts, given.out, given.most)
    elif given.command == "texts":
        texts(given.data, given.out)
    else:
        shape = SHAPE | json.loads(given.shape)
        settings = given.minutes, given.batch, given.length, given.rate, given.seed, given.experts
        train(given.data, given.out, *settings, shape)


if __name__ == "__main__":
    main()
