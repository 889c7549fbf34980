"""A page that generates videos in a browser: one self-contained file, which downloads nothing.

    engine.js      nerv.py and dit.py in JavaScript                  extras.js    the parts of extras/ needed for decoding
    gemm.wat       matrix multiplication with SIMD, source           gemm.wasm    the same, compiled
    page.js        the controls; gif.js writes GIFs                  template.html    HTML and styles

`write` fills in the template. tests/test_page.py compares frames with PyTorch's.
"""

import base64
import dataclasses
import html
import json
import re
from pathlib import Path

import numpy as np

import extras
from common.utils import UserError, whole

HERE = Path(__file__).parent
MOST = 20_000_000  # parameters of the largest model, a page of 53 MB

CREDITS = {  # for the art of a data set, which generated videos resemble
    "sprites": "Characters after the Liberated Pixel Cup, by its artists: CC BY-SA 3.0 and GPL 3.0 (lpc.opengameart.org).",
}


def in_script(value):
    """JSON that is safe inside a <script> element, whatever strings it contains."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def write(path, ckpt, networks, guidance=2.0, steps=20, seed=0, note=""):
    """Write the page of a checkpoint of dit.py and its networks (dit.load_dit).

    guidance, steps and seed are for the first video; note is a paragraph at the end of the page. Weights are stored in half
    precision. UserError for models that a page does not support: frame prediction, too large, another decoder or denoiser.
    """
    model, vae, latent_map = networks
    vae_config = ckpt["vae"]["config"]
    if model.config.cond_frames:
        raise UserError("a page cannot predict frames: train without --cond-frames")
    for name in (ckpt["denoiser"], ckpt["vae"]["decoder"]):
        if name not in ("DiT", "NeRV"):
            raise UserError(f"a page supports the networks of dit.py and nerv.py, not {name}")
    tensors = {f"dit.{name}": x for name, x in model.state_dict().items()}
    tensors |= {f"latent_map.{name}": x for name, x in latent_map.state_dict().items()}
    tensors |= {name: x for name, x in vae.state_dict().items() if name.startswith("nerv.")}
    count = sum(x.numel() for x in tensors.values())
    if count > MOST:
        raise UserError(f"a model of {count / 1e6:.0f} M parameters is too large for a page (at most {MOST / 1e6:.0f} M)")
    weights = np.concatenate([x.cpu().flatten().float().numpy() for x in tensors.values()]).astype("<f2")
    if not np.isfinite(weights).all():
        raise UserError("some weights are too large for half precision")

    chosen = extras.parse(vae_config["extras"], extras.VAE) | extras.parse(ckpt["config"]["extras"], extras.DIT)
    about = {
        "dit_config": dataclasses.asdict(model.config), "nerv_config": dataclasses.asdict(vae.nerv_config), "extras": chosen,
        "classes": ckpt["classes"], "defaults": {"guidance": guidance, "steps": steps, "seed": seed},
        "tensors": {name: x.numel() for name, x in tensors.items()},
        "product": base64.b64encode((HERE / "gemm.wasm").read_bytes()).decode(),
    }  # fmt: skip
    fields = {
        "ABOUT": in_script(about),
        "WEIGHTS": base64.b64encode(weights.tobytes()).decode(),
        "NOTE": "".join(f"<p>{html.escape(text)}</p>" for text in (note, CREDITS.get(vae_config["dataset"])) if text),
        "SCRIPTS": "\n".join((HERE / f"{name}.js").read_text() for name in ("engine", "extras", "gif", "page")),
    }
    text = re.sub(r"\{\{([A-Z]+)\}\}", lambda field: fields[field[1]], (HERE / "template.html").read_text())  # in one pass
    with whole(path) as part:
        part.write_text(text, "utf-8")
    print(f"wrote {path}, {len(text) / 1e6:.1f} MB, {count / 1e6:.2f} M parameters: open it in a browser")
