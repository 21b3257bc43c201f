"""Train a small model that sees, to judge quantisers on a model that really learned something.

    python examples/train_vlm.py prepare --trunk SMOLLM2 --out data EMOJI FASHION ...   # pictures, pairs, the trunk
    python examples/train_vlm.py train --data data --out vlm                            # minutes on a GPU

The trunk is a Llama that a package ships (a GGUF file or a folder), the tower a small SigLIP that learns from nothing,
and one matrix leads from the one to the other: the layout of Idefics3, so `tenfold run --image` opens the result.
Sources are folders of emoji (`emoji.json`, as emoji-datasource has it), of Fashion-MNIST, and words that Pillow writes.
Questions have short answers; one picture in ten is held out, and accuracy is that of whole answers on those.

`prepare` keeps the trunk as the file it is, which is smaller than its weights in bfloat16; `train` opens it.
"""

import argparse
import gzip
import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

HELD_OUT = 10  # every so many pictures
SIDE = 64  # pixels of a picture
CLOTHES = (
    *("t-shirt", "trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "boot"),
)
COLOURS = {
    "red": (200, 30, 30),
    "green": (20, 140, 40),
    "blue": (30, 60, 200),
    "black": (0, 0, 0),
    "orange": (240, 130, 0),
}
WORDS = (
    *("apple", "bread", "cloud", "dance", "eagle", "flame", "grape", "house", "juice", "knife", "lemon", "mouse"),
    *("night", "ocean", "piano", "queen", "river", "stone", "tiger", "uncle", "voice", "whale", "young", "zebra"),
)
TOWER = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
FOLD = 2  # patches of a side that become one token
PATCH = 8
IMAGE, FAKE, WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


Item = tuple[Image.Image, list[tuple[str, str]]]  # a picture, and what is asked about it with the answers


def emoji(folder: Path) -> Iterator[Item]:
    """Pictures of emoji: which group they are of, and what they are called."""
    for one in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
        file = next(folder.rglob(f"64/{one['image']}"), None)
        if file is None:
            continue
        image = Image.open(file).convert("RGBA")
        whole = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
        group, name = one["category"].lower(), one["name"].lower()
        yield whole, [("Which group is this emoji of?", group), ("What does this emoji show?", name)]


def fashion(folder: Path, most: int) -> Iterator[Item]:
    """Fashion-MNIST: what somebody could wear."""
    images, labels = (sorted(folder.rglob(f"*{kind}*ubyte.gz")) for kind in ("images", "labels"))
    for pictures, names in zip(images, labels):
        pixels = np.frombuffer(gzip.decompress(pictures.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
        kinds = np.frombuffer(gzip.decompress(names.read_bytes()), np.uint8, offset=8)
        for image, kind in zip(pixels[:most], kinds[:most]):
            yield Image.fromarray(image).convert("RGB"), [("What piece of clothing is this?", CLOTHES[kind])]


def written(count: int, draw: random.Random) -> Iterator[Item]:
    """Words and numbers as Pillow writes them: what they say, and their colour."""
    for number in range(count):
        colour = draw.choice(sorted(COLOURS))
        text = draw.choice(WORDS) if number % 2 else str(draw.randrange(1000))
        ground = draw.randrange(215, 256), draw.randrange(215, 256), draw.randrange(215, 256)
        image = Image.new("RGB", (SIDE, SIDE), ground)
        place, font = (draw.randrange(2, 8), draw.randrange(4, 40)), ImageFont.load_default(draw.randrange(16, 23))
        ImageDraw.Draw(image).text(place, text, COLOURS[colour], font)
        yield image, [("What is written here?", text), ("What colour is the writing?", colour)]


def prepare(sources: list[Path], trunk: Path, out: Path, most: int, seed: int) -> None:
    """train/ and held_out/ of 64-pixel pictures with their pairs, and the trunk's file."""
    draw = random.Random(seed)
    found = list(written(most, draw))
    for source in sources:
        if (source / "emoji.json").is_file():
            found += emoji(source)
        elif next(source.rglob("*images*ubyte.gz"), None):
            found += fashion(source, most)
        else:
            raise SystemExit(f"{source} has neither emoji.json nor *images*ubyte.gz; give a folder with one of them.")
    lines: dict[str, list[str]] = {"train": [], "held_out": []}
    for part in lines:
        (out / part).mkdir(parents=True, exist_ok=True)
    draw.shuffle(found)
    for number, (image, asked) in enumerate(found):
        part = "held_out" if number % HELD_OUT == 0 else "train"
        name = f"{number:06}.png"
        image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).quantize(64).save(out / part / name, optimize=True)
        for question, answer in asked:
            lines[part].append(json.dumps({"image": name, "question": question, "answer": answer}, ensure_ascii=False))
    for part, own in lines.items():
        (out / part / "pairs.jsonl").write_text("\n".join(own), encoding="utf-8")
        print(f"{part}: {len(own)} pairs")
    place = out / "trunk"
    if trunk.is_dir():
        shutil.copytree(trunk, place, dirs_exist_ok=True)
    else:
        place.mkdir(exist_ok=True)
        shutil.copyfile(trunk, place / "trunk.gguf")


def trunk_of(folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A checkpoint and its tensors, dense."""
    from tenfold.ops.blocks import dequantize
    from tenfold.weights.open import open_checkpoint

    file = folder / "trunk.gguf"
    checkpoint = open_checkpoint(file if file.is_file() else folder)
    return checkpoint, {name: dequantize(checkpoint.tensor(name)) for name in checkpoint.names()}


def make(folder: Path, tower: dict[str, int], seed: int) -> tuple[Any, Any, list[str]]:
    """Transformers' Idefics3 around the trunk, the trunk's tokenizer, and the names of what is new."""
    import transformers

    checkpoint, tensors = trunk_of(folder)
    tokenizer = checkpoint.tokenizer()
    new = [token for token in (IMAGE, FAKE, WHOLE) if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens(new)
    raw = checkpoint.config
    keys = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id"),
    )
    vocabulary = max(tokenizer.get_vocab_size(), len(tensors["model.embed_tokens.weight"]))
    text = {key: raw[key] for key in keys if raw.get(key) is not None} | {
        "vocab_size": vocabulary,
        "rope_parameters": {"rope_type": "default", "rope_theta": raw.get("rope_theta", 10000.0)},
        "tie_word_embeddings": True,
        "pad_token_id": None,
        "model_type": "llama",
    }
    end = tokenizer.token_to_id("<|im_end|>")
    config = transformers.Idefics3Config(
        text_config=text,
        vision_config={**tower, "image_size": SIDE, "patch_size": PATCH},
        image_token_id=tokenizer.token_to_id(IMAGE),
        scale_factor=FOLD,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=raw.get("eos_token_id") if end is None else end,
    )
    torch.manual_seed(seed)
    model = transformers.Idefics3ForConditionalGeneration(config)
    table = tensors["model.embed_tokens.weight"]
    grown = torch.randn(vocabulary - len(table), table.shape[1]) * table.std() + table.mean(0)
    tensors["model.embed_tokens.weight"] = torch.cat([table, grown])
    own = {"model.text_model." + n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    missing, unexpected = model.load_state_dict(own, strict=False)
    if unexpected or any(name.startswith("model.text_model.") for name in missing):
        raise SystemExit(f"The trunk is no Llama that Idefics3 holds: {unexpected[:3] or missing[:3]}.")
    model.tie_weights()
    return model, tokenizer, new


def questions(
    folder: Path, part: str, tokenizer: Any, image: str
) -> list[tuple[Image.Image, list[int], list[int], str]]:
    """Pictures with the tokens of prompts and of answers, and the questions."""
    made = []
    for line in (folder / part / "pairs.jsonl").read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        prompt = f"<|im_start|>user\n{image}{pair['question']}<|im_end|>\n<|im_start|>assistant\n"
        ids, said = (tokenizer.encode(t, add_special_tokens=False).ids for t in (prompt, f"{pair['answer']}<|im_end|>"))
        picture = Image.open(folder / part / pair["image"]).convert("RGB")
        made.append((picture, ids, said, pair["question"]))
    return made


def batch_of(chosen: list[Any], device: str) -> dict[str, torch.Tensor]:
    """Padded at the end; labels of answers alone."""
    length = max(len(ids) + len(said) for _, ids, said, _ in chosen)
    ids = torch.zeros(len(chosen), length, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (_, asked, said, _) in enumerate(chosen):
        whole = torch.tensor([*asked, *said])
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        labels[row, len(asked) : len(whole)] = whole[len(asked) :]
    pixels = np.stack([np.asarray(image) for image, *_ in chosen])
    numbers = torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, None].to(device).float() / 127.5 - 1
    own = {"input_ids": ids.to(device), "labels": labels.to(device), "attention_mask": mask.to(device)}
    return own | {"pixel_values": numbers, "pixel_attention_mask": torch.ones_like(numbers[:, :, 0], dtype=torch.bool)}


@torch.inference_mode()
def right(model: Any, held: list[Any], batch: int, device: str) -> dict[str, float]:
    """Share of whole answers, by question and over all."""
    hits: dict[str, list[bool]] = {}
    for i in range(0, len(held), batch):
        given = batch_of(held[i : i + batch], device)
        labels = given.pop("labels")
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            best = model(**given).logits[:, :-1].argmax(-1)
        fine = ((best == labels[:, 1:]) | (labels[:, 1:] == -100)).all(-1).tolist()
        for (_, _, _, question), hit in zip(held[i : i + batch], fine):
            hits.setdefault(question, []).append(hit)
    found = {question: sum(own) / len(own) for question, own in sorted(hits.items())}
    return found | {"all": sum(map(sum, hits.values())) / len(held)}


def train(
    data: Path, out: Path, minutes: float, batch: int, rate: float, seed: int, tower: dict[str, int], freeze: int
) -> None:
    """freeze: layers of the trunk, from the first, that stay as they are; -1: all of it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer, _ = make(data / "trunk", tower, seed)
    model.to(device)
    tokens = (SIDE // PATCH // FOLD) ** 2
    image = f"{FAKE}{WHOLE}{IMAGE * tokens}{FAKE}"
    learnt, held = (questions(data, part, tokenizer, image) for part in ("train", "held_out"))
    text = model.model.text_model
    frozen = [text.embed_tokens, *(text.layers if freeze < 0 else text.layers[:freeze])]
    for module in frozen:
        module.requires_grad_(False)
    seen, trunk = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (trunk if name.startswith("model.text_model.") else seen).append(parameter)
    groups = [{"params": seen, "rate": rate}, {"params": trunk, "rate": rate / 10}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.1f} million parameters, {len(learnt)} pairs, {len(held)} held out, on {device}", flush=True)
    draw = random.Random(seed)
    state = out.with_name(f".{out.name}.state.pt")
    given = {"data": digest_of(data), "minutes": minutes, "batch": batch, "rate": rate, "seed": seed}
    given |= {"freeze": freeze, "tower": tower}
    step, spent = resumed(state, given, model, optimizer, draw) if state.is_file() else (0, 0.0)
    begin, kept = time.monotonic() - spent, time.monotonic()
    model.train()
    while (done := (time.monotonic() - begin) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                group["rate"] * min(1.0, (step + 1) / 200) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))
            )
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(**batch_of(draw.sample(learnt, min(batch, len(learnt))), device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_((*seen, *trunk), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0 or step < 3:
            print(f"{time.monotonic() - begin:6.0f} s  step {step:5}  loss {loss.item():.3f}", flush=True)
        if time.monotonic() - kept > 60:
            keep(state, given, model, optimizer, draw, step, time.monotonic() - begin)
            kept = time.monotonic()
    model.eval()
    found = right(model, held, batch, device)
    print("\n".join(f"{share:7.2%} right: {question}" for question, share in found.items()))
    save(model, tokenizer, out)
    card = {"steps": step, "accuracy": found, "seed": seed, "parameters": count, "pairs": len(learnt)}
    (out / "training.json").write_text(json.dumps(card, indent=1))
    state.unlink(missing_ok=True)


def digest_of(data: Path) -> str:
    """Of the pairs that are learnt and judged."""
    found = hashlib.sha256()
    for part in ("train", "held_out"):
        found.update((data / part / "pairs.jsonl").read_bytes())
    return found.hexdigest()


def keep(
    path: Path, given: dict[str, Any], model: Any, optimizer: Any, draw: random.Random, step: int, spent: float
) -> None:
    """What an interrupted run goes on from; given: what it was asked for."""
    written = path.with_suffix(".part")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "draw": draw.getstate()}
    torch.save({"given": given, "step": step, "spent": spent, **state}, written)
    written.replace(path)


def resumed(path: Path, given: dict[str, Any], model: Any, optimizer: Any, draw: random.Random) -> tuple[int, float]:
    """Of a run that was asked for the same; the message names what differs of another."""
    state = torch.load(path, weights_only=True)
    begun = state.get("given", {})
    other = ", ".join(f"--{name}" for name in given if begun.get(name) != given[name])
    if other:
        raise SystemExit(
            f"{path} is of a training that was begun with other {other}; give the same, or remove it to begin anew."
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    draw.setstate(state["draw"])
    print(f"going on after step {state['step']}", flush=True)
    return int(state["step"]), float(state["spent"])


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """A folder as SmolVLM has it, in bfloat16."""
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(TEMPLATE)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    (out / "tokenizer_config.json").write_text(json.dumps(kind))
    settings = {
        "image_processor_type": "Idefics3ImageProcessor",
        "do_image_splitting": False,
        "size": {"longest_edge": SIDE},
        "max_image_size": {"longest_edge": SIDE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(settings, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("sources", nargs="*", type=Path)
    preparing.add_argument("--trunk", type=Path, required=True, help="a .gguf file, or a folder, of a Llama")
    preparing.add_argument("--out", type=Path, required=True)
    preparing.add_argument("--most", type=int, default=8000, help="pictures of words, and of each source of clothes")
    preparing.add_argument("--seed", type=int, default=0)
    training = commands.add_parser("train")
    training.add_argument("--data", type=Path, required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--minutes", type=float, default=5.0)
    training.add_argument("--batch", type=int, default=128)
    training.add_argument("--rate", type=float, default=1e-3, help="of what is new; the trunk learns at a tenth")
    training.add_argument("--freeze", type=int, default=0, help="layers of the trunk that stay as they are; -1: all")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--tower", default="{}", help="JSON: what differs from the usual tower")
    given = parser.parse_args()
    if given.command == "prepare":
        prepare(given.sources, given.trunk, given.out, given.most, given.seed)
        return
    tower = TOWER | json.loads(given.tower)
    train(given.data, given.out, given.minutes, given.batch, given.rate, given.seed, tower, given.freeze)


if __name__ == "__main__":
    main()
