"""The page of one prompt: its tokens, their latents, and what changing a latent does to the next tokens.

`python -m harvest encode RUN --prompt TEXT --html FILE` runs the LLM and has it drawn here. One file; no network.
"""

from typing import Any

from train.report.page import asset, environment, short


def prompt_page(title: str, found: dict[str, Any], browser: str | None) -> bytes:
    """Draw the page.

    `found` is what `encode --json` prints, with `activations`: of each latent, at each token. `browser` is the address
    of the run's latent browser, seen from the page; none: the latents are no links.
    """
    labels = {one["latent"]: one for one in found["latents"]}
    activations = {int(latent): values for latent, values in found["activations"].items()}
    order = sorted(activations, key=lambda latent: (-max(activations[latent][1:] or activations[latent]), latent))
    largest = max((max(values) for values in activations.values()), default=0.0)
    tokens = [one | {"shown": short(one["text"])} for one in found["tokens"]]
    latents = [
        {
            "latent": latent,
            "values": activations[latent],
            "shares": [round(max(value, 0.0) / largest, 3) if largest else 0.0 for value in activations[latent]],
            "label": labels.get(latent, {}),
            "changes": [_scaled(one) for one in found["changes"] if one["latent"] == latent],
        }
        for latent in order
    ]
    return (
        environment()
        .get_template("prompt.html")
        .render(
            title=title,
            tokens=tokens,
            latents=latents,
            browser=browser,
            visible=short,
            style=asset("style.css"),
            prompt_style=asset("prompt.css"),
            script=asset("prompt.js"),
        )
        .encode()
    )


def _scaled(change: dict[str, Any]) -> dict[str, Any]:
    """Return a change with the probability that fills a bar."""
    most = max((max(token["before"], token["after"]) for token in change["next"]), default=0.0)
    return change | {"most": most or 1.0}
