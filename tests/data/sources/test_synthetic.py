"""Synthetic images."""

from support.sources import NUM_IMAGES, build, read_batches, to_rows


def read_rows(split, **options):
    (images, _), = read_batches(build("synthetic", None, split, batch_size=NUM_IMAGES, **options))
    return set(to_rows(images))


def test_synthetic_images_are_the_same_in_every_epoch_and_others_in_another_split():
    assert len(read_rows("train")) == NUM_IMAGES
    assert read_rows("train") == read_rows("train")
    assert not read_rows("train") & read_rows("val")
    assert not read_rows("train") & read_rows("train", seed=4)
    (first, _), (second, _) = read_batches(build("synthetic", None, batch_size=NUM_IMAGES), epochs=2)
    assert set(to_rows(first)) == set(to_rows(second))
