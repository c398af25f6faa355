import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_localdit.pipeline_localdit import ASPECT_RATIO_BINS
from diffusers_localdit.training.buckets import (
    UNUSABLE,
    assign,
    assign_all,
    batches_per_epoch,
    buckets,
    merge_small_buckets,
    plan_epoch,
    read_sizes,
)
from diffusers_localdit.training.shards import DataError
from diffusers_localdit.training.sources import BrokenSample

SIZES = buckets(128, 16)
PLANS = st.lists(st.integers(UNUSABLE, 4), max_size=80).map(lambda plan: np.array([2, *plan]))


@pytest.mark.parametrize("image_size", [256, 512, 1024, 2048])
def test_sizes_are_those_of_the_pipelines_where_these_have_a_table(image_size):
    table = {(int(height), int(width)) for height, width in ASPECT_RATIO_BINS[image_size].values()}
    assert set(buckets(image_size, 16)) == table


@pytest.mark.parametrize("image_size, step", [(64, 16), (128, 16), (384, 16), (768, 16), (768, 32), (256, 64)])
def test_sizes_elsewhere(image_size, step):
    sizes = buckets(image_size, step)
    assert (image_size, image_size) in sizes
    assert len(sizes) == len(set(sizes)) and sizes == sorted(sizes, key=lambda size: size[0] / size[1])
    assert set(sizes) == {(width, height) for height, width in sizes}
    for height, width in sizes:
        assert height % step == width % step == 0
        assert 1 / 4 <= height / width <= 4
        assert 0 <= image_size**2 - height * width < step * max(height, width)  # the next row would be too much
    assert min(height / width for height, width in sizes) == 1 / 4
    assert buckets(image_size, step, aspect_ratio_buckets=False) == [(image_size, image_size)]


@pytest.mark.parametrize("image_size", [0, 8, 100])
def test_sizes_that_the_model_cannot_take_are_refused(image_size):
    with pytest.raises(DataError, match=f"the image size is {image_size}; expected a multiple of 16"):
        buckets(image_size, 16)


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1))
def test_pictures_get_the_nearest_aspect_ratio(pictures):
    found = assign_all(np.array([*pictures, (0, 0)]), SIZES)
    assert found[-1] == UNUSABLE
    for (height, width), place in zip(pictures, found):
        distances = [abs(np.log(height / width) - np.log(h / w)) for h, w in SIZES]
        assert distances[place] == pytest.approx(min(distances))
        assert assign(height, width, SIZES) == SIZES[place]


@given(PLANS, st.integers(1, 12))
def test_merged_buckets_can_fill_a_batch(plan, global_batch_size):
    merged = merge_small_buckets(plan, SIZES, global_batch_size)
    np.testing.assert_array_equal(merged == UNUSABLE, plan == UNUSABLE)
    counts = np.unique(merged[merged != UNUSABLE], return_counts=True)[1]
    assert len(counts) <= 1 or counts.min() >= global_batch_size
    large = np.flatnonzero(np.bincount(plan[plan != UNUSABLE], minlength=1) >= global_batch_size)
    for bucket in large:  # what fills a batch stays
        assert (merged[plan == bucket] == bucket).all()


@pytest.mark.parametrize(
    "plan, merged",
    [
        ([0, 3, 3, 3, 4, 8, 8, 8], [3, 3, 3, 3, 3, 8, 8, 8]),
        ([0, 1, 1, 8, 8, 8], [1, 1, 1, 8, 8, 8]),  # together they fill a batch
    ],
)
def test_small_buckets_go_to_the_nearest_aspect_ratio(plan, merged):
    np.testing.assert_array_equal(merge_small_buckets(np.array(plan), SIZES, 3), merged)


@given(PLANS, st.integers(1, 12), st.integers(0, 2**63), st.integers(0, 1000))
def test_an_epoch_shows_no_sample_twice_and_leaves_out_less_than_a_batch_per_bucket(plan, size, seed, epoch):
    batches = plan_epoch(plan, size, seed, epoch)
    assert batches.shape == (batches_per_epoch(plan, size), size)
    assert len(np.unique(batches)) == batches.size
    for batch in batches:
        assert len(np.unique(plan[batch])) == 1 and plan[batch[0]] != UNUSABLE
    left_out = np.setdiff1d(np.flatnonzero(plan != UNUSABLE), batches)
    assert np.bincount(plan[left_out], minlength=1).max() < size
    np.testing.assert_array_equal(batches, plan_epoch(plan, size, seed, epoch))


def test_epochs_differ_in_order_company_and_remainder():
    plan = np.repeat([0, 1], [103, 53])
    epochs = [plan_epoch(plan, 10, 0, epoch) for epoch in range(3)]
    left_out = [np.setdiff1d(np.arange(156), batches).tolist() for batches in epochs]
    assert len({tuple(rest) for rest in left_out}) == 3
    assert len({frozenset(batch) for batches in epochs for batch in batches.tolist()}) == 45
    buckets_in_order = [tuple(plan[batches[:, 0]]) for batches in epochs]
    assert len(set(buckets_in_order)) == 3
    assert not np.array_equal(epochs[0], plan_epoch(plan, 10, 1, 0))


@settings(max_examples=5)
@given(st.integers(0, 100))
def test_shuffling_is_fair(seed):
    """Each of 10 places of a sample is met about equally often over the epochs."""
    places = [np.flatnonzero(plan_epoch(np.zeros(10, int), 1, seed, epoch)[:, 0] == 3)[0] for epoch in range(1000)]
    counts = np.bincount(places, minlength=10)
    assert ((counts - 100) ** 2 / 100).sum() < 40  # chi square with 9 degrees of freedom, p < 1e-5


class Listed:
    """A source of which only the sizes matter."""

    def __init__(self, sizes, name="a"):
        self.sizes, self.name, self.reads = sizes, name, 0

    def __len__(self):
        return len(self.sizes)

    def fingerprint(self):
        return self.name

    def size(self, index):
        self.reads += 1
        if self.sizes[index] is None:
            raise BrokenSample(str(index), "is no picture")
        return self.sizes[index]


def test_sizes_are_read_once(tmp_path):
    cache = tmp_path / "run" / "sizes.json"
    for attempt in range(2):
        source = Listed([(3, 4), None, (5, 6)])
        sizes, broken = read_sizes(source, cache)
        assert sizes.tolist() == [[3, 4], [0, 0], [5, 6]] and broken == ["1: is no picture"]
        assert source.reads == (3 if attempt == 0 else 0)
    assert read_sizes(Listed([(7, 8)], name="b"), cache)[0].tolist() == [[7, 8]]
    assert json.loads(cache.read_text())["fingerprint"] == "b"
    assert read_sizes(Listed([(1, 2)]))[0].tolist() == [[1, 2]]
    cache.write_text(cache.read_text()[:20])
    with pytest.raises(ValueError, match=r"sizes.json is damaged .*; remove it to have it made again"):
        read_sizes(Listed([(7, 8)], name="b"), cache)
