"""Exact counts, the ones that an implementation must show."""

from __future__ import annotations

import json

import pytest
import timm

from conv2former.errors import UserError
from conv2former.models import zoo

# (model, kernel, image, parameters, multiply-adds in G to the digits given)
EXPECTED = [
    ("conv2former_n", 7, 224, 14_992_840, "2.330"),
    ("conv2former_n", 11, 224, 15_241_672, "2.406"),
    ("conv2former_t", 5, 224, 26_137_332, "4.190"),
    ("conv2former_t", 7, 224, 26_277_300, "4.232"),
    ("conv2former_t", 9, 224, 26_463_924, "4.289"),
    ("conv2former_t", 11, 224, 26_697_204, "4.361"),
    ("conv2former_t", 15, 224, 27_303_732, "4.545"),
    ("conv2former_t", 21, 224, 28_563_444, "4.930"),
    ("conv2former_s", 11, 224, 50_032_692, "8.708"),
    ("conv2former_b", 5, 224, 88_370_232, "15.457"),
    ("conv2former_b", 7, 224, 88_784_952, "15.565"),
    ("conv2former_b", 9, 224, 89_337_912, "15.709"),
    ("conv2former_b", 11, 224, 90_029_112, "15.890"),
    ("conv2former_b", 15, 224, 91_826_232, "16.360"),
    ("conv2former_b", 21, 224, 95_558_712, "17.335"),
    ("conv2former_b", 11, 384, 90_029_112, "46.695"),
    ("conv2former_l", 11, 224, 198_893_736, "36.037"),
    ("conv2former_l", 11, 384, 198_893_736, "105.904"),
]
# of each kind the smallest, whose layers are counted anew
QUICK = ("conv2former_n", "conv2former_is", "conv2former_is_conv3", "conv2former_n_sum", "conv2former_atto")
ISOTROPIC = [
    ("conv2former_is", "23.2", "4.28"),
    ("conv2former_is_conv3", "23.4", "4.47"),
    ("conv2former_ib", "85.7", "16.51"),
    ("conv2former_ib_conv3", "87.0", "17.3"),
]


@pytest.mark.parametrize(
    "number",
    [pytest.param(i, marks=[] if e[0] in QUICK else pytest.mark.slow) for i, e in enumerate(zoo.LISTED)],
)
def test_the_stored_counts_are_those_of_the_networks(number: int) -> None:
    assert json.loads(zoo.COUNTS.read_text())[number] == zoo.count_again(*zoo.LISTED[number])


def test_every_row_of_the_paper_has_its_exact_counts(counted: list[zoo.Row]) -> None:
    found = {(r.name, r.kernel_size, r.image_size): (r.params, f"{r.macs / 1e9:.3f}") for r in counted}
    for name, kernel, image, params, macs in EXPECTED:
        assert found[name, kernel, image] == (params, macs), (name, kernel, image)


def test_the_isotropic_models_meet_the_settled_counts(counted: list[zoo.Row]) -> None:
    found = {r.name: r for r in counted}
    for name, params, macs in ISOTROPIC:
        assert f"{found[name].params / 1e6:.1f}" == params
        digits = len(macs.split(".")[1])
        assert f"{found[name].macs / 1e9:.{digits}f}" == macs


def test_every_registered_name_is_listed_once(counted: list[zoo.Row]) -> None:
    defaults = [r.name for r in counted[: len(counted) - len(zoo.VARIANTS)]]
    assert sorted(defaults) == sorted(timm.list_models("conv2former*"))
    assert len({(r.name, r.kernel_size, r.image_size) for r in counted}) == len(counted)


def test_the_small_line_is_about_as_large_as_it_says(counted: list[zoo.Row]) -> None:
    params = {r.name: r.params / 1e6 for r in counted}
    for name, wanted in (("atto", 3.5), ("femto", 5), ("pico", 9)):
        assert params[f"conv2former_{name}"] == pytest.approx(wanted, rel=0.1)


def test_any_timm_model_can_be_counted() -> None:
    params, macs = zoo.count("convnext_tiny", image_size=224)
    assert (f"{params / 1e6:.1f}", f"{macs / 1e9:.1f}") == ("28.6", "4.5")  # as Table 3 prints
    with pytest.raises(UserError, match="did you mean 'convnext_tiny'"):
        zoo.count("convnext_tinny", image_size=224)
