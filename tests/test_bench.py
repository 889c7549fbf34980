import pytest
import torch
from test_nerv import SMALL, relative, small

from bench.speed import image_decoder, loop_over_videos, pixel_shuffle, shared_and_block


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_other_ways_to_convolve_give_the_same(name):
    model, tokens = small(name)
    for where, layer in model.table_layers():
        x = torch.randn(2, 3 * layer.in_ch, 5, 6, dtype=torch.float64)
        for way in (loop_over_videos, pixel_shuffle if layer.upsample else shared_and_block):
            assert relative(way(layer, x, tokens), layer(x, tokens)) < 1e-10, (where, way.__name__)


def test_the_image_decoder_is_stable_diffusions():
    with torch.device("meta"):
        model = image_decoder()
    assert sum(p.numel() for p in model.parameters()) == 49_490_179  # AutoencoderKL's decoder, as published
    assert model(torch.empty(1, 4, 8, 8, device="meta")).shape == (1, 3, 64, 64)
