"""Colours are checked pixel by pixel; sheets by where their panels end up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fa_stereo.visualization
from fa_stereo.visualization import (
    ERROR_COLORS,
    NEGATIVE_COLOR,
    POSITIVE_COLOR,
    attention_page,
    colorize_disparity,
    colorize_error,
    contact_sheet,
    disparity_legend,
    disparity_range,
    error_legend,
    overlay_weights,
    resize_to_width,
    side_by_side,
    weights_legend,
)


def contains(sheet: np.ndarray, picture: np.ndarray) -> bool:
    """Whether a picture appears unchanged anywhere in a sheet."""
    height, width = picture.shape[:2]
    corners = np.argwhere((sheet == picture[0, 0]).all(axis=2))
    return any(np.array_equal(sheet[y : y + height, x : x + width], picture) for y, x in corners)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_disparity_colours_are_rgb_from_blue_to_red_with_black_for_no_value() -> None:
    disparity = np.array([[0, 16, 32, 64, 100, np.inf, np.nan, -np.inf]], np.float32)
    picture = colorize_disparity(disparity, maximum=64)
    assert picture.shape == (1, 8, 3)
    assert picture.dtype == np.uint8
    far, quarter, middle, near, beyond = picture[0, :5].astype(int)
    assert quarter[2] > quarter[0]  # bluish
    assert middle[1] == max(middle)  # greenish
    assert near[0] > 2 * near[2]  # reddish
    assert np.array_equal(near, beyond)
    assert far.sum() > 0
    assert (picture[0, 5:] == 0).all()


@pytest.mark.parametrize("maximum", [0.0, -1.0, float("nan"), float("inf")])
def test_the_last_colour_needs_a_disparity(maximum: float) -> None:
    with pytest.raises(ValueError, match="positive number of pixels"):
        colorize_disparity(np.ones((2, 2)), maximum)


def test_disparity_range_ignores_outliers_and_missing_values() -> None:
    disparity = np.full((100, 100), 40.0, np.float32)
    disparity[0, :10] = 5000
    disparity[1, :] = np.inf
    assert disparity_range(disparity) == pytest.approx(40)
    np.testing.assert_array_equal(colorize_disparity(disparity), colorize_disparity(disparity, 40))
    assert disparity_range(np.full((4, 4), np.inf)) == 1
    assert (colorize_disparity(np.full((4, 4), np.inf)) == 0).all()
    assert colorize_disparity(np.zeros((4, 4), np.float32)).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("error", "disparity", "limit"),
    [
        (0.1, 10, 0.0),
        (0.2, 10, 0.1875),
        (0.5, 10, 0.375),
        (1.0, 10, 0.75),
        (2.0, 10, 1.5),
        (2.99, 10, 1.5),
        (3.01, 10, 3.0),
        (10.0, 10, 6.0),
        (20.0, 10, 12.0),
        (30.0, 10, 24.0),
        (100.0, 10, 48.0),
        (4.0, 100, 1.5),  # 4 % of the disparity: right by D1, 60 * 4 / 100 = 2.4
        (6.0, 100, 3.0),  # 6 %: wrong, 3.6
        (1.0, 0, 0.75),  # no disparity to relate to
    ],
)
def test_error_colours_by_hand(error: float, disparity: float, limit: float) -> None:
    target = np.array([[disparity]], np.float32)
    color = colorize_error(target + np.float32(error), target)[0, 0]
    assert tuple(color) == dict(ERROR_COLORS)[limit]


def test_error_without_ground_truth_is_black_and_without_prediction_worst() -> None:
    target = np.array([[10, np.inf, 10, 10]], np.float32)
    prediction = np.array([[10, 10, np.nan, 50]], np.float32)
    picture = colorize_error(prediction, target)
    assert tuple(picture[0, 0]) == ERROR_COLORS[0][1]
    assert (picture[0, 1] == 0).all()
    assert tuple(picture[0, 2]) == ERROR_COLORS[-1][1]
    masked = colorize_error(prediction, target, np.array([[True, True, True, False]]))
    assert (masked[0, 3] == 0).all()
    assert (masked[0, 0] != 0).any()


def test_legends_show_every_colour() -> None:
    legend = error_legend(400)
    for _, color in ERROR_COLORS:
        assert (legend == color).all(axis=2).any()
    assert legend.shape[1] == disparity_legend(64, 400).shape[1] == 400


def test_panels_are_put_unchanged_into_columns_with_titles() -> None:
    pictures = [noise(40, 150, seed) for seed in range(5)]
    sheet = side_by_side([(f"Panel {i}", picture) for i, picture in enumerate(pictures)], columns=3)
    for picture in pictures:
        assert contains(sheet, picture)
    assert 3 * 150 < sheet.shape[1] < 3 * 150 + 100
    assert 2 * 40 < sheet.shape[0] < 2 * 40 + 150
    white = np.full((40, 150, 3), 0, np.uint8)
    bare = side_by_side([("", white)])
    titled = side_by_side([("A title", white)])
    assert bare.shape == titled.shape
    assert (bare != titled).any()


def test_panels_may_differ_in_size_and_be_grey() -> None:
    small, large, grey = noise(20, 60), noise(90, 200, 1), noise(50, 70, 2)[..., 0]
    sheet = side_by_side([("small", small), ("large", large), ("grey", grey)], footer=[("legend", error_legend(500))])
    assert contains(sheet, small)
    assert contains(sheet, large)
    assert contains(sheet, np.repeat(grey[..., None], 3, axis=2))
    assert contains(sheet, error_legend(500))


def test_a_long_title_stays_inside_its_panel() -> None:
    black = np.zeros((30, 100, 3), np.uint8)
    sheet = side_by_side([("a title that is far too long for a picture as narrow as this one is", black), ("b", black)])
    gap = sheet[:, 12 + 100 : 12 + 100 + 10]  # between the panels
    assert (gap == 255).all()


def test_contact_sheet_scales_to_one_width() -> None:
    sheet = contact_sheet([(str(i), noise(60 + 20 * i, 300)) for i in range(5)], columns=2, width_px=100)
    assert 200 < sheet.shape[1] < 260
    tall = resize_to_width(noise(300, 100), 50)
    assert tall.shape == (150, 50, 3)


def test_a_smaller_sparse_map_keeps_its_colours() -> None:
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[::4, ::3, :2] = 200  # few pixels have a value
    picture[:, 60:] = 0
    small = resize_to_width(picture, 20, sparse=True)
    assert small.shape == (10, 20, 3)
    assert (small[:, :15] == (200, 200, 0)).all()
    assert (small[:, 15:] == 0).all()
    np.testing.assert_array_equal(resize_to_width(picture, 160, sparse=True)[0, 0], (200, 200, 0))


def test_no_panels_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        side_by_side([])


def test_weights_glow_over_a_dark_grey_picture() -> None:
    """A thousandth of the largest weight and less is nothing, what is between is the brighter the larger."""
    weights = np.full((6, 10), 1e-9, np.float32)
    weights[1, 2:6] = 0.9, 0.09, 0.009, 0.0009
    picture = noise(60, 100)
    drawn = overlay_weights(picture, weights)
    assert drawn.shape == (60, 100, 3)
    assert drawn.dtype == np.uint8
    middle = drawn[15, 25:66:10].astype(int)  # of the cells
    brightness = middle.sum(1)
    assert brightness[0] > brightness[1] > brightness[2]
    assert middle[0][0] > middle[0][2] + 50  # yellow
    dark = drawn[40:, :]
    assert (dark == dark[..., :1]).all()  # grey
    assert dark.max() < 128
    np.testing.assert_array_equal(drawn[15, 65:], drawn[15, 65:, :1].repeat(3, 1))  # no glow, 1e-9 of 0.9


def test_the_largest_weight_has_a_ring_and_the_pixel_a_cross() -> None:
    weights = np.full((6, 10), 1e-9, np.float32)
    weights[4, 7] = 1
    black = np.zeros((120, 200, 3), np.uint8)
    drawn = overlay_weights(black, weights, pixel=(30, 20))
    ys, xs = np.nonzero((drawn > 200).all(2))
    assert np.hypot(ys - 90, xs - 150).max() < 15  # around the middle of the cell
    assert tuple(drawn[20, 30]) == (80, 255, 80)
    assert tuple(overlay_weights(black, weights)[20, 30]) != (80, 255, 80)


def test_weights_of_both_signs_are_red_and_blue() -> None:
    weights = np.array([[1.0, -1.0, 0.0]], np.float32).repeat(3, 0)
    drawn = overlay_weights(np.zeros((90, 300, 3), np.uint8), weights)
    red, blue, nothing = drawn[80, 50].astype(int), drawn[80, 150].astype(int), drawn[80, 250].astype(int)
    assert red.argmax() == 0
    assert blue.argmax() == 2
    assert nothing.max() < 30


@pytest.mark.parametrize("value", [0.0, 0.25, np.nan, np.inf])
def test_weights_without_structure_do_no_harm(value: float) -> None:
    assert overlay_weights(noise(20, 30), np.full((5, 6), value, np.float32)).shape == (20, 30, 3)


def test_legends_of_weights() -> None:
    for signed, ends in ((False, None), (True, (NEGATIVE_COLOR, POSITIVE_COLOR))):
        legend = weights_legend(400, signed=signed)
        assert legend.shape[1] == 400
        assert legend[0, -1].sum() > 255
        if ends:
            np.testing.assert_array_equal(legend[0, [0, -1]], ends)


def test_a_page_is_whole_and_names_cannot_leave_the_script() -> None:
    factor = np.random.default_rng(0).random((2, 3, 4))
    page = attention_page(noise(12, 16), factor, factor, ["a", "</script><b>"], "<i>title", top_px=2)
    assert "/*DATA*/" not in page
    assert page.count("</script>") == 1
    assert "<i>title" not in page
    assert "src=" not in page.replace("picture.src =", "")  # nothing is fetched
    assert "data:image/png;base64," in page


def test_drawing_needs_nothing_else_of_this_package() -> None:
    """So that every room may draw, training too."""
    source = Path(fa_stereo.visualization.__file__).read_text()
    assert "from fa_stereo" not in source
