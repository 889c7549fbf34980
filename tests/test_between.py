"""studies.between: frames between the shown ones are compared with what is drawn at their times."""

import torch

import data
import vae
from common.video import to_clip
from studies import between


def test_frames_are_compared_at_their_own_times(trained, monkeypatch, capsys):
    shapes = data.Shapes("test", 32, 16)

    def perfect(network, clips, device, t):
        drawn = [to_clip(shapes.draw(i, t.numpy())) for i in (0, 256)]
        assert torch.equal(clips, torch.stack([x[::2] for x in drawn]))  # every second is shown
        return torch.stack(drawn)

    monkeypatch.setattr(vae, "reconstruct", perfect)
    between.main(f"--ckpt {trained}/vae.pt --clips 2 --scale 2".split())
    shown, other = capsys.readouterr().out.splitlines()
    assert shown.split()[:2] == ["shown", "16"] and other.split()[:2] == ["between", "15"]
    assert "PSNR 100.00 dB, of the blend 100.00 dB" in shown
    assert "PSNR 100.00 dB" in other and float(other.split()[-2]) < 40
