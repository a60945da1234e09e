"""Judging whether two pictures look like a rectified pair, and the right way round.

A stereo network only searches along rows. In a rectified pair every point therefore has the same height in both views
(``y_right = y_left``) and lies further left in the right view (``x_right <= x_left``). Corners matched between the
views tell whether this is so:

1. ORB corners of both views, at most 1,000 each, on grey pictures reduced to at most 1280 px of width or height.
   A match must be the best one in both directions, clearly better than the next best (ratio 0.8), and within 15 % of
   the picture's height.
2. A plane ``y_right - y_left = a + b x + c y`` (a shift, a rotation, a difference of zoom) is fitted robustly.
   The pair looks **unrectified** if the plane departs from zero by more than ``MISALIGNMENT_PX`` (root mean square over
   the picture) and the hypothesis "no difference" explains less than ``ALIGNED_RATIO`` of the matches that the plane
   explains. The second condition keeps wrong matches, as repetitive texture has them, from raising an alarm.
3. Matches on the plane whose columns differ by more than ``DISPARITY_TOLERANCE_PX`` tell left from right; far points,
   which are at the same place in both views, do not. With ``MIN_MOVED`` of the former, the views look **swapped** if
   more than ``SWAPPED_SHARE`` of them lie further right in the right view.

With fewer than ``MIN_MATCHES`` matches, or if the plane explains less than ``MIN_CONSISTENT`` of them (pictures of
different scenes, noise), nothing is said. All lengths are in pixels of the reduced pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

MAX_SIDE_PX = 1280
MAX_CORNERS = 1000
MIN_MATCHES = 30
MIN_CONSISTENT = 0.4
INLIER_PX = 1.5
MISALIGNMENT_PX = 1.5
ALIGNED_RATIO = 0.7
DISPARITY_TOLERANCE_PX = 2.0
MIN_MOVED = 20
SWAPPED_SHARE = 0.8


@dataclass(frozen=True)
class PairJudgement:
    """What matched corners say about a pair.

    Attributes:
        matches: Number of matched corners.
        vertical_shift_px: Fitted difference in height, ``y_right - y_left``, at the centre of the picture.
        tilt_degrees: Fitted rotation of the right view against the left one.
        misalignment_px: Root mean square of the fitted difference in height over the picture.
        aligned_ratio: Matches explained by "no difference" over matches explained by the fit.
        moved: Number of those on the fit whose columns clearly differ.
        swapped_share: Share of these with negative disparity.
        scale: Size of the pictures that were compared, by that of the pair; pixels, above, are theirs.
    """

    matches: int
    vertical_shift_px: float
    tilt_degrees: float
    misalignment_px: float
    aligned_ratio: float
    moved: int
    swapped_share: float
    scale: float = 1.0

    @property
    def looks_unrectified(self) -> bool:
        """Whether corresponding points do not lie in the same rows."""
        return self.misalignment_px > MISALIGNMENT_PX and self.aligned_ratio < ALIGNED_RATIO

    @property
    def looks_swapped(self) -> bool:
        """Whether the right view seems to have been given as the left one."""
        return self.moved >= MIN_MOVED and self.swapped_share > SWAPPED_SHARE

    @property
    def warnings(self) -> list[str]:
        """One sentence for each thing that looks wrong; empty for a good pair."""
        sentences = []
        if self.looks_swapped:
            sentences.append(
                f"left and right look swapped: {self.swapped_share:.0%} of {self.moved} matched points lie further "
                "right in the right view; give the two views in the other order"
            )
        if self.looks_unrectified:
            sentences.append(
                f"the pair looks unrectified: the heights of {self.matches} matched points differ by "
                f"{self.misalignment_px / self.scale:.1f} px (shift {self.vertical_shift_px / self.scale:+.1f} px, "
                f"tilt {self.tilt_degrees:+.1f} degrees); rectify it with the calibration of the cameras first"
            )
        return sentences


def judge_pair(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> PairJudgement | None:
    """Judge whether a pair looks unrectified or swapped.

    Args:
        left: Left picture, uint8 RGB [H, W, 3] or grey [H, W].
        right: Right picture of the same size.

    Returns:
        The judgement, or None where too few corners match, or too contradictorily, to say anything.
    """
    left_points, right_points = match_corners(left, right)
    if len(left_points) < MIN_MATCHES:
        return None
    height, width = left.shape[:2]
    scale = min(1.0, MAX_SIDE_PX / max(height, width))
    half = np.array([width, height], np.float64) * scale / 2
    position = right_points - half  # [N, 2], origin at the centre
    difference = right_points[:, 1] - left_points[:, 1]  # [N]
    plane = _fit_plane(position, difference)
    shift, slope_x, slope_y = plane
    on_plane = np.abs(difference - _evaluate(plane, position)) <= INLIER_PX
    consistent = int(np.count_nonzero(on_plane))
    if consistent < MIN_CONSISTENT * len(left_points):
        return None
    aligned = int(np.count_nonzero(np.abs(difference) <= INLIER_PX))
    disparity = (left_points[:, 0] - right_points[:, 0])[on_plane]
    moved = disparity[np.abs(disparity) > DISPARITY_TOLERANCE_PX]
    return PairJudgement(
        matches=len(left_points),
        vertical_shift_px=float(shift),
        tilt_degrees=math.degrees(math.atan(slope_x)),
        # the mean of (a + b x + c y)^2 over a rectangle around the origin
        misalignment_px=math.sqrt(shift**2 + ((slope_x * half[0]) ** 2 + (slope_y * half[1]) ** 2) / 3),
        aligned_ratio=aligned / consistent,
        moved=len(moved),
        swapped_share=float(np.mean(moved < 0)) if len(moved) else 0.0,
        scale=scale,
    )


def match_corners(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Match ORB corners between two views.

    Returns:
        Positions (x, y) in the left and in the right picture, [N, 2] each, in pixels of the reduced pictures.
    """
    empty = np.zeros((0, 2))
    left_points, left_descriptors = _corners(left)
    right_points, right_descriptors = _corners(right)
    if len(left_points) < 2 or len(right_points) < 2:
        return empty, empty
    reach = max(16.0, 0.15 * left.shape[0] * min(1.0, MAX_SIDE_PX / max(left.shape[:2])))
    near = np.abs(left_points[:, None, 1] - right_points[None, :, 1]) <= reach  # [Nl, Nr]
    mask = near.astype(np.uint8)
    matcher = cv2.BFMatcher(cv2.NORM_HAMMING)
    forward = matcher.knnMatch(left_descriptors, right_descriptors, k=3, mask=mask)
    backward = matcher.knnMatch(right_descriptors, left_descriptors, k=1, mask=np.ascontiguousarray(mask.T))
    best_left = {found[0].queryIdx: found[0].trainIdx for found in backward if found}
    kept: list[tuple[int, int]] = []
    for found in forward:
        if not found or best_left.get(found[0].trainIdx) != found[0].queryIdx:
            continue
        target = right_points[found[0].trainIdx]
        # the same corner found at another scale is no rival
        rivals = [f.distance for f in found[1:] if np.abs(right_points[f.trainIdx] - target).max() >= 4]
        if not rivals or found[0].distance < 0.8 * rivals[0]:
            kept.append((found[0].queryIdx, found[0].trainIdx))
    if not kept:
        return empty, empty
    chosen = np.array(kept)
    return left_points[chosen[:, 0]], right_points[chosen[:, 1]]


def _corners(picture: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Return positions [N, 2] and descriptors [N, 32] of the ORB corners of a picture."""
    grey = picture if picture.ndim == 2 else cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    scale = MAX_SIDE_PX / max(grey.shape)
    if scale < 1:
        height, width = (max(1, round(scale * side)) for side in grey.shape)
        grey = cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA)
    # views of a pair hardly differ in scale: three levels do
    detector = cv2.ORB.create(nfeatures=MAX_CORNERS, scaleFactor=1.3, nlevels=3, edgeThreshold=16, fastThreshold=7)
    keypoints, descriptors = detector.detectAndCompute(grey, None)
    if descriptors is None:
        return np.zeros((0, 2)), np.zeros((0, 32), np.uint8)
    return np.array([keypoint.pt for keypoint in keypoints], np.float64), np.asarray(descriptors, np.uint8)


def _evaluate(plane: NDArray[np.float64], position: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``a + b x + c y`` at positions [N, 2] for planes [..., 3]: [..., N]."""
    values: NDArray[np.float64] = plane[..., :1] + plane[..., 1:] @ position.T
    return values


def _fit_plane(position: NDArray[np.float64], difference: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fit ``difference = a + b x + c y`` robustly: RANSAC over triples, then least squares over its inliers.

    Returns:
        (a, b, c). The draws are seeded: the same pair is always judged alike.
    """
    generator = np.random.default_rng(0)
    triples = generator.integers(0, len(position), size=(200, 3))
    corners = np.concatenate([np.ones((*triples.shape, 1)), position[triples]], axis=-1)  # [200, 3, 3]
    # triples close to a line determine no plane
    solvable = np.abs(np.linalg.det(corners)) > 1e-3 * np.ptp(position, axis=0).prod()
    planes = np.zeros((1, 3))  # "no difference" is always among the hypotheses
    if solvable.any():
        solutions = np.linalg.solve(corners[solvable], difference[triples[solvable]][..., None])[..., 0]
        planes = np.concatenate([planes, solutions])
    residuals = np.abs(difference - _evaluate(planes, position))  # [hypotheses, N]
    plane = planes[np.count_nonzero(residuals <= INLIER_PX, axis=1).argmax()]
    inliers = np.abs(difference - _evaluate(plane, position)) <= INLIER_PX
    design = np.concatenate([np.ones((len(position), 1)), position], axis=1)  # [N, 3]
    fitted: NDArray[np.float64] = np.linalg.lstsq(design[inliers], difference[inliers], rcond=None)[0]
    return fitted
