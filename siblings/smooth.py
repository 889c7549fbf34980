"""How smoothly a video moves, by optical flow: OpenCV, which siblings need for nothing else (studies/requirements.txt)."""

import numpy as np


def motion_smoothness(frames):
    """Frames uint8 [F, H, W, 3], three or more -> up to 1: how well each one is what its two neighbours make of it.

    VBench (Huang et al. 2024) drops frames, has a network, AMT, interpolate them, and takes 1 less the mean absolute error in
    [0, 1]. Here DIS flow (Kroeger et al. 2016) between the neighbours warps each half of the way, and their mean is taken.
    """
    import cv2

    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]].astype(np.float32)

    def halfway(one, other):
        greys = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (one, other))
        flow = dis.calc(*greys, None) / 2  # [H, W, 2], x first
        return cv2.remap(one, x - flow[..., 0], y - flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    triples = zip(frames, frames[1:], frames[2:])
    errors = [halfway(one, other) / 2 + halfway(other, one) / 2 - real for one, real, other in triples]
    return float(1 - np.abs(errors).mean() / 255)
