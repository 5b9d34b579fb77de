"""Ways to damage an HDF5 file, and the sentence with which a reader refuses it."""

import zlib

import h5py
import numpy as np
import pytest

from genima.files import UserError


def refusal(function, *arguments):
    """The sentence with which a function refuses."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 1000 and sentence.endswith("."), sentence
    assert "delete" not in sentence, sentence
    return sentence


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def attribute(name, value):
    def change(root):
        root.attrs[name] = value

    return change


def instead(dataset, make):
    """A way to damage a file: in place of a dataset stands what make(its shape) gives."""

    def change(root):
        shape = root[dataset].shape
        del root[dataset]
        root[dataset] = make(shape)

    return change


def missing_source(shape):
    layout = h5py.VirtualLayout(shape, np.float32)
    layout[...] = h5py.VirtualSource("elsewhere.hdf5", "data", shape)
    return layout


def virtual(dataset):
    def change(root):
        shape = root[dataset].shape
        del root[dataset]
        root.create_virtual_dataset(dataset, missing_source(shape))

    return change


def promised(dataset, *shape, chunks=None, kind=np.float32):
    """An array of this shape of which nothing was written."""

    def change(root):
        del root[dataset]
        root.create_dataset(dataset, shape, kind, chunks=chunks or True)

    return change


def zeros(dataset, *shape):
    """A megabyte in the file, and gigabytes in memory."""

    def change(root):
        del root[dataset]
        chunk = (10_000, *shape[1:])
        data = root.create_dataset(dataset, shape, np.float32, chunks=chunk, compression=9)
        packed = zlib.compress(bytes(4 * int(np.prod(chunk))), 9)
        for first in range(0, shape[0], chunk[0]):
            data.id.write_direct_chunk((first, *[0] * (len(shape) - 1)), packed)

    return change


def unknown_filter(dataset):
    def change(root):
        data = root[dataset][()]
        del root[dataset]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk(data.shape)
        plist.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple(data.shape)
        kind = h5py.h5t.py_create(data.dtype)
        made = h5py.h5d.create(root.id, dataset.encode(), kind, space, plist)
        made.write_direct_chunk((0,) * data.ndim, data.tobytes())

    return change
