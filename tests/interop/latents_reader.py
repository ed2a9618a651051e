"""What other libraries make of exported latents: `python latents_reader.py LIBRARY FOLDER VALUES OUT`.

In the library's environment; imports nothing of this project. VALUES is an .npz with all activations of some latents,
by their numbers; OUT gets JSON.
"""

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch


def delphi(folder: Path, values: dict[int, np.ndarray]) -> dict[str, Any]:
    """`LatentDataset`, every latent's locations and activations by its own buffers, and the examples that it makes."""
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset

    class Tokenizer:
        """As much of one as making examples asks for: numbers as text."""

        bos_token_id = pad_token_id = 0

        def decode(self, tokens: Any, **_: Any) -> str:
            return " ".join(map(str, np.ravel(tokens).tolist()))

        def batch_decode(self, rows: Any, **_: Any) -> list[str]:
            return [self.decode(row) for row in rows]

        def convert_ids_to_tokens(self, tokens: Any) -> list[str]:
            return list(map(str, np.ravel(tokens).tolist()))

    config = ConstructorConfig(min_examples=20, n_non_activating=5)
    where, sampler = folder / "latents", SamplerConfig(n_examples_train=5, n_examples_test=5)
    dataset = LatentDataset(where, sampler, config, Tokenizer())
    some = {dataset.modules[0]: torch.tensor(sorted(values)[:8])}
    explained = LatentDataset(where, sampler, config, Tokenizer(), latents=some)
    largest, compared = 0.0, 0
    for buffer in dataset.buffers:
        for latent, locations, found in zip(*buffer.load_data_per_latent(), strict=True):
            assert (locations[:, 2] == latent).all()
            if int(latent) in values:
                own = torch.from_numpy(values[int(latent)])
                assert len(own) == len(found), "latents have other numbers of activations"
                largest = max(largest, float((found.float() - own).abs().max() / own.max()))
                compared += len(own)
    return {
        "activations compared": compared,
        "largest error over the largest activation (float16)": largest,
        "latents with examples, of 8": len([record for record in explained if record is not None]),
        "tokens": dataset.tokens.numel(),
    }


def SAEDashboard(folder: Path, values: dict[int, np.ndarray]) -> dict[str, Any]:
    """SAEDashboard's classes of a dashboard, its histograms again, and the activations of Neuronpedia's client."""
    from neuronpedia.np_activation import Activation
    from neuronpedia.np_feature import Feature, Logit
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardFeature
    from sae_dashboard.utils_fns import HistogramData

    (place,) = folder.glob("*/*/")
    known = set(NeuronpediaDashboardFeature().to_dict())
    features, activations, differing, compared = 0, 0, 0, 0
    for line in _lines(place / "features"):
        own = {name: value for name, value in line.items() if name in known}
        f = NeuronpediaDashboardFeature(feature_index=int(line["index"]), **own).feature_index
        logits = [
            [Logit(*one) for one in zip(line[f"{end}_str"], line[f"{end}_values"], strict=True)]
            for end in ("pos", "neg")
        ]
        Feature(line["modelId"], line["layer"], f, line["frac_nonzero"], *logits)
        features += 1
        if len(values.get(f, ())):
            theirs = HistogramData.from_data(torch.from_numpy(values[f]), 50, "5 ticks", None)
            differing += int(np.abs(np.array(theirs.bar_heights) - line["freq_hist_data_bar_heights"]).sum()) // 2
            compared += len(values[f])
            np.testing.assert_allclose(theirs.bar_values, line["freq_hist_data_bar_values"], rtol=1e-4, atol=1e-4)
    for line in _lines(place / "activations"):
        # the client takes shares alone (-1 marks the strongest), and a column that the server adds
        Activation.from_np_db_json(line | {"binContains": max(line["binContains"], 0), "source": line["layer"]})
        activations += 1
    return {
        "latents": features,
        "contexts": activations,
        "activations in another bar than theirs": differing / max(compared, 1),
    }


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.iterdir(), key=lambda one: int(one.name.split("-")[1].split(".")[0])):
        with gzip.open(file, "rt", encoding="utf-8") as opened:
            yield from map(json.loads, opened)


def main() -> None:
    """Read an export."""
    library, folder, values, out = sys.argv[1:]
    known = {int(name): found for name, found in np.load(values).items()}
    Path(out).write_text(json.dumps(globals()[library](Path(folder), known)))


if __name__ == "__main__":
    main()
