"""An attribution graph by circuit-tracer from an export: `python graph.py FOLDER MODEL OUT`, in its environment.

Imports nothing of this project. MODEL is a folder of a Gemma-2 model, such as the embedded one; OUT gets JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from circuit_tracer import attribute
from circuit_tracer.graph import prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from hooked import hooked_config
from transformer_lens.pretrained.weight_conversions import convert_gemma_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "import os\n\ndef read(path):\n    with open(path) as file:\n        return file."
WRAPPED = {".mlp.": ".mlp.old_mlp.", "unembed.": "unembed.old_unembed."}
"""What the replacement model wraps, and has under another name."""
NODES, EDGES = 0.65, 0.8
"""Shares of the influence on the logits that the nodes and the edges of the picture have, by the library's pruning."""


def main() -> None:
    """Load, attribute, and write the sizes of the graph and how far the model's logits are from transformers'."""
    folder, model, out = sys.argv[1:]
    # sdpa leaves out Gemma-2's soft caps
    loaded = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(model)
    transcoders, _ = load_transcoder_from_hub(str(Path(folder).resolve()), dtype=torch.float32)
    replacement = TransformerLensReplacementModel.from_config(
        hooked_config(loaded.config), transcoders, tokenizer=tokenizer
    )
    state = convert_gemma_weights(loaded, replacement.cfg)
    for part, name in WRAPPED.items():
        state = {key.replace(part, name): value for key, value in state.items()}
    assert not replacement.load_state_dict(state, strict=False).unexpected_keys
    tokens = torch.tensor([tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        error = (replacement(tokens[None]) - loaded(tokens[None]).logits).abs().max()
    graph = attribute(tokens, replacement, max_n_logits=5, verbose=False)
    features = graph.active_features  # [n, 3] layer, position, latent
    found = {
        "largest error of a logit": float(error),
        "tokens": len(tokens),
        "nodes": len(graph.adjacency_matrix),
        "latents": len(features),
        "edges": int((graph.adjacency_matrix != 0).sum()),
        "layers with latents": len(features[:, 0].unique()),
    }
    Path(out).write_text(json.dumps({"sizes": found, "picture": pruned(graph, tokenizer)}))


def pruned(graph: Any, tokenizer: Any) -> dict[str, Any]:
    """What the library's pruning leaves: tokens, nodes [kind, layer, position, name], edges [from, to, weight]."""
    keep, edges, _ = prune_graph(graph, NODES, EDGES)
    layers, tokens = graph.cfg.n_layers, [tokenizer.decode([one]) for one in graph.input_tokens.tolist()]
    nodes: list[tuple[str, int, int, str]] = [
        ("latent", layer, position, str(latent))
        for layer, position, latent in graph.active_features[graph.selected_features].tolist()
    ]
    nodes += [("error", layer, position, "") for layer in range(layers) for position in range(graph.n_pos)]
    nodes += [("token", -1, position, token) for position, token in enumerate(tokens)]
    nodes += [("logit", layers, graph.n_pos - 1, one.token_str) for one in graph.logit_targets]
    kept = keep.nonzero().flatten().tolist()
    places = {node: place for place, node in enumerate(kept)}
    weights = graph.adjacency_matrix
    return {
        "tokens": tokens,
        "layers": layers,
        "nodes": [nodes[i] for i in kept],
        "edges": [
            (places[source], places[target], float(weights[target, source]))
            for target, source in (edges & keep & keep[:, None]).nonzero().tolist()
        ],
    }


if __name__ == "__main__":
    main()
