"""The page: its engine against PyTorch in Node, and the whole of it in headless Chromium (make test-page)."""

import dataclasses
import json
import re
import shutil
import subprocess

import pytest
import torch
from PIL import Image

import dit
import extras
import nerv
import page
import sample
import vae
from common import checkpoints, utils

SHOWN = "[...model.nerv.forward(tokens_shown(), state.off)(2.5)]"  # the frame of a page at a time
SCRIPTS = re.compile(r"<script[^>]*>(.*?)</script>", re.S)  # of a page: the sizes, the weights, the code
T = [0.0, 2.5, 9.25, -1.5]  # on, between and beyond frames
ODD = dict(num_tokens=7, token_dim=10, width=16, block=8, last_factor=2)  # divide neither blocks nor the product's four lanes
VARIANTS = {  # sizes of the decoder, extras of stage 1 and of stage 2
    "nano": ({}, ["filter", "mixing=8", "muon"], ["components=4x32", "muon"]),
    "paper's": ({}, [], []),
    "odd sizes, the stem of S": (ODD | dict(stem_fraction=1), [], []),
    "odd sizes, the stem of B": (ODD | dict(stem_fraction=2), ["edges"], ["components=3x7"]),
    "64 x 64, one scene": (dict(resolution=64, num_frames=8, width=16, block=16), ["basis=24"], ["components=2x16"]),
    "16 x 16, one block": (dict(resolution=16, num_tokens=5, width=16, block=12), ["edges"], []),
}
HOSTILE = ["</script><script>alert(1)</script>", "<!--<script>", "{{WEIGHTS}}", "\u2028'\"\\", "<img src=x onerror=alert(1)>"]
GENERATE = """({ about, weights, noise, label, guidance, steps, t, simd }) => {
  let numbers = from_half(new Uint16Array(bytes_of(weights).buffer));
  if (simd) numbers = use_simd(bytes_of(about.product), numbers, 1e6);
  const { dit, nerv, latent_map } = load_dit(about, numbers);
  const path = [...generate(dit, label, Float32Array.from(noise), steps, guidance)];
  return t.flatMap(t => [...nerv.forward(latent_map.inverse(path.at(-1)))(t)]);
}"""


def checkpoint(name, classes=("one", "two", "three")):
    """An untrained checkpoint of a variant in half precision, no parameter of which is zero, and its networks."""
    sizes, stage1, stage2 = VARIANTS[name]
    torch.manual_seed(0)
    config = dataclasses.replace(nerv.CONFIGS["nano"], **sizes)
    encoder = vae.EncoderConfig(width=48, depth=1, heads=8, patch=(4, 8, 8))
    autoencoder = extras.build_vae(vae.VAE, config, encoder, nerv.NeRV, stage1)
    latent_map = extras.latent_map(stage2, (config.num_tokens, config.token_dim))
    model = dit.DiT(dit.DiTConfig(*latent_map.shape, len(classes), 0, width=24, depth=2, heads=3))
    with torch.no_grad():
        for x in (x for part in (autoencoder, latent_map, model) for x in part.state_dict().values()):
            x.copy_(torch.where(x == 0, 0.3 * torch.randn(x.shape), x).half())
        latent_map.scale.fill_(150)  # such a denoiser ends far from unit deviation
    ckpt = {"stage": "dit", "classes": list(classes), "denoiser": "DiT", "config": {"extras": stage2}}
    ckpt |= {"dit_config": vars(model.config), "ema": model.state_dict(), "latent_map": latent_map.state_dict()}
    sizes = {"nerv_config": vars(config), "encoder_config": vars(encoder)}
    ckpt["vae"] = sizes | {
        "decoder": "NeRV",
        "ema": autoencoder.state_dict(),
        "config": {"extras": stage1, "dataset": "sprites"},
    }
    return ckpt, dit.load_dit(ckpt)


def frames(networks, label, seed, guidance, steps, t):
    """What sample.py makes: [T, H, W, 3]."""
    model, autoencoder, latent_map = networks
    tokens = latent_map.inverse(dit.generate(model, torch.tensor([label]), steps, guidance, seed=seed))
    return vae.decode_all(autoencoder, tokens, torch.tensor(t))[0].permute(0, 2, 3, 1)


def node(code, job):
    """Runs the engine and then `code`, a function of `job`, in Node; returns the numbers that it returns."""
    node = shutil.which("node") or pytest.skip("there is no node")
    engine = "\n".join((page.HERE / f"{name}.js").read_text() for name in ("engine", "extras"))
    code = f"const job = JSON.parse(require('fs').readFileSync(0)), made = Float32Array.from(({code})(job));"
    command = [node, "-e", f"{engine}\n{code}\nprocess.stdout.write(Buffer.from(made.buffer));"]
    done = subprocess.run(command, input=json.dumps(job).encode(), capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.float32)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_engine_makes_the_frames_of_sample_py(name, tmp_path):
    ckpt, networks = checkpoint(name)
    checkpoints.save(tmp_path / "dit.pt", **ckpt)
    sample.main(["--ckpt", str(tmp_path / "dit.pt"), "--page", str(tmp_path / "new" / "page.html"), "--seed", "5"])
    about, weights, _ = SCRIPTS.findall((tmp_path / "new" / "page.html").read_text())
    job, c = {"about": json.loads(about), "weights": weights, "label": 1, "t": T}, networks[0].config
    assert job["about"]["defaults"] == {"guidance": 2.0, "steps": 20, "seed": 5}
    for seed, guidance, steps, simd in ((3, 1, 4, True), (4, 2, 7, True), (4, 2, 7, False))[: 3 if name == "nano" else 2]:
        noise = torch.randn(1, c.num_tokens, c.token_dim, generator=torch.Generator().manual_seed(seed))
        made = node(GENERATE, job | dict(noise=noise.flatten().tolist(), guidance=guidance, steps=steps, simd=simd))
        wanted = frames(networks, 1, seed, guidance, steps, T)
        assert wanted.std() > 0.05 and (wanted[0] - wanted[1]).std() > 1e-3  # a picture, and a video
        assert (made.view(wanted.shape) - wanted).abs().max() < 1e-3


def test_noise_and_timesteps_are_those_of_python():
    job = dict(counts=[16, 37, 2048], seeds=[0, 7, 2**32 - 1])
    made = node("({ counts, seeds }) => seeds.flatMap(seed => counts.flatMap(count => [...randn(seed, count)]))", job)
    noise = [torch.randn(n, generator=torch.Generator().manual_seed(s)) for s in job["seeds"] for n in job["counts"]]
    assert torch.allclose(made, torch.cat(noise), atol=1e-5)
    made = node("steps => steps.flatMap(n => sampling_times(n, noise_schedule().lam))", steps := [1, 2, 20, 50, 150])
    assert made.tolist() == [t for n in steps for t in dit.sampling_times("dpm", n, *dit.noise_schedule())]


def test_the_matrix_product_is_its_text_in_bytes():
    wasmtime = pytest.importorskip("wasmtime")
    assert bytes(wasmtime.wat2wasm((page.HERE / "gemm.wat").read_text())) == (page.HERE / "gemm.wasm").read_bytes()


def test_a_page_is_text_whatever_its_names_and_is_refused_in_one_line(tmp_path):
    ckpt, networks = checkpoint("nano", HOSTILE)
    page.write(tmp_path / "page.html", ckpt, networks, note="<b>{{ABOUT}}</b>")
    about, weights, code = SCRIPTS.findall(text := (tmp_path / "page.html").read_text())
    assert json.loads(about)["classes"] == HOSTILE and "<" not in about and "alert" not in code and weights not in about
    assert "&lt;b&gt;{{ABOUT}}&lt;/b&gt;" in text
    with pytest.raises(utils.UserError, match="not Mine"):
        page.write(tmp_path / "page.html", ckpt | {"denoiser": "Mine"}, networks)


@pytest.fixture
def opened(tmp_path):
    """opened(ckpt, networks, …) -> a page in a browser without network; whatever it logs, asks or requests fails the test."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="there is no playwright: pip install playwright")
    chromium, problems = shutil.which("chromium") or pytest.skip("there is no Chromium: apt-get install chromium"), []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])

        def opened(ckpt, networks, fragment=""):
            page.write(tmp_path / "page.html", ckpt, networks)
            tab = browser.new_context(offline=True).new_page()
            for event in ("console", "pageerror", "dialog"):
                tab.on(event, lambda what: problems.append(str(what)))
            tab.on("request", lambda what: problems.append(what.url) if what.url.startswith("http") else None)
            tab.goto((tmp_path / "page.html").as_uri() + fragment)
            tab.wait_for_selector("html[data-ready]", state="attached")
            return tab

        yield opened
        browser.close()
    assert not problems


def until(tab, condition):  # playwright's own wait is an eval, which the page forbids
    assert any(tab.evaluate(condition) or tab.wait_for_timeout(20) for _ in range(3000)), condition


@pytest.mark.browser
def test_the_page_shows_what_pytorch_makes_takes_every_control_and_a_link_shows_the_same_again(opened):
    ckpt, networks = checkpoint("64 x 64, one scene", HOSTILE)  # whose names would raise a dialog
    tab = opened(ckpt, networks)
    for label, button in enumerate(tab.locator("#classes button").all()):
        button.click()
        until(tab, f"videos.A.label === {label} && !state.watching && !state.stale")
        wanted = frames(networks, label, 0, 2.0, 20, [2.5]).flatten()
        assert (torch.tensor(tab.evaluate(SHOWN)) - wanted).abs().max() < 1e-3
    for slider in tab.locator("input[type=range]").all():
        for part in (0, 1, 0.3):
            slider.evaluate(f"x => {{ x.value = +x.min + {part} * (x.max - x.min); x.oninput(); }}")
            until(tab, "!state.stale")
    tab.locator("#beyond").check()
    for button in tab.locator("button:not(#save)").all():
        button.click()
        until(tab, "!state.stale")
    assert tab.evaluate("play(false), model.simd")
    with tab.expect_download() as download:
        tab.locator("#save").click()
    gif = Image.open(download.value.path())
    assert gif.format == "GIF" and gif.size == (320, 320) and gif.n_frames > 5
    until(tab, "!state.watching && !state.stale")
    tab.evaluate("$('walk').value = 0.25, $('step').value = 7")
    wanted, link = torch.tensor(tab.evaluate(SHOWN)), tab.evaluate("link()")
    again = opened(ckpt, networks, link[link.index("#") :])
    assert torch.equal(torch.tensor(again.evaluate(SHOWN)), wanted) and not again.evaluate("state.playing")
    wrong = opened(ckpt, networks, "#A=99,-1,x,0&B=&step=x&walk=7&off=99,x&speed=&time=1e9&chosen=C")
    assert wrong.evaluate("[videos.A.label, videos.A.seed, state.off.size]") == [0, 0, 0]
