"""FCN-8s on VGG-16 (Long, Shelhamer, Darrell 2015), and its public Cityscapes weights, read without Caffe.

The network is that of the pix2pix authors' scripts/eval_cityscapes/caffemodel/deploy.prototxt, layer by layer and by
its names; their fcn-8s-cityscapes.caffemodel is a protobuf message of the types in caffe.proto.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bench.common import fail

CONVS = (2, 2, 3, 3, 3)  # convolutions before each pooling
MEAN = (72.78044, 83.21195, 73.45286)  # of blue, green and red, which the authors' cityscapes.py takes off


class FCN8s(nn.Module):
    """Scores at strides 32, 16 and 8, enlarged by learned filters and added up, cropped to the image.
    x (N, 3, H, W), RGB in [0, 1] -> scores (N, classes, H, W)."""

    def __init__(self, classes=20, widths=(64, 128, 256, 512, 512), hidden=4096):
        super().__init__()
        c_in = 3
        for level, (width, count) in enumerate(zip(widths, CONVS), 1):
            for i in range(1, count + 1):  # the first has so much room around that fc6 fits any image
                self.add_module(f"conv{level}_{i}", nn.Conv2d(c_in, width, 3, padding=100 if c_in == 3 else 1))
                c_in = width
        self.fc6, self.fc7 = nn.Conv2d(c_in, hidden, 7), nn.Conv2d(hidden, hidden, 1)
        self.score_pool3, self.score_pool4 = nn.Conv2d(widths[2], classes, 1), nn.Conv2d(widths[3], classes, 1)
        self.score_fr = nn.Conv2d(hidden, classes, 1)
        self.upscore2 = nn.ConvTranspose2d(classes, classes, 4, 2, bias=False)
        self.upscore_pool4 = nn.ConvTranspose2d(classes, classes, 4, 2, bias=False)
        self.upscore8 = nn.ConvTranspose2d(classes, classes, 16, 8, bias=False)

    def forward(self, x):
        (high, wide), pooled = x.shape[2:], []
        x = 255 * x[:, [2, 1, 0]] - x.new_tensor(MEAN)[:, None, None]
        for level, count in enumerate(CONVS, 1):
            for i in range(1, count + 1):
                x = F.relu(self.get_submodule(f"conv{level}_{i}")(x))
            x = F.max_pool2d(x, 2, ceil_mode=True)  # Caffe rounds up
            pooled.append(x)
        x = self.upscore2(self.score_fr(F.relu(self.fc7(F.relu(self.fc6(x))))))  # their dropout is for training
        x = self.upscore_pool4(x + crop(self.score_pool4(pooled[3]), 5, x))
        x = self.upscore8(x + crop(self.score_pool3(pooled[2]), 9, x))
        return x[:, :, 31 : 31 + high, 31 : 31 + wide]


def crop(x, offset, like):
    """x (N, C, H, W) from `offset` on, as large as `like`."""
    return x[:, :, offset : offset + like.shape[2], offset : offset + like.shape[3]]


# -- .caffemodel -----------------------------------------------------------------------------------------------------


def read_varint(data, at):
    """A number of seven bits a byte, lowest first, at a place in `data`. -> the number, and where it ends."""
    value, shift = 0, 0
    while data[at] > 127:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def fields(data):
    """Yields number and value, a memoryview, of each field of a protobuf message that has a length."""
    at, fixed = 0, {1: 8, 5: 4}  # bytes of the wire types that have no length
    while at < len(data):
        tag, at = read_varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = read_varint(data, at)
        elif kind == 2:
            size, at = read_varint(data, at)
            yield tag >> 3, data[at : at + size]
            at += size
        else:
            at += fixed[kind]


def read_caffemodel(path):
    """{layer: [weight, bias]}, flat arrays, of a NetParameter of either kind that Caffe has written."""
    kinds = {100: (1, 7), 2: (4, 6)}  # LayerParameter and V1LayerParameter: the fields of the name and of the blobs
    layers = {}
    for number, layer in fields(memoryview(path.read_bytes())):
        if number in kinds:
            name_field, blob_field = kinds[number]
            found = [*fields(layer)]
            name = b"".join(value for number, value in found if number == name_field).decode()
            blobs = [dict(fields(value)) for number, value in found if number == blob_field]
            layers[name.removesuffix("_cs")] = [np.frombuffer(blob[5], "<f4") for blob in blobs]  # 5 is its data
    return layers


def load(path, net=None):
    """The FCN-8s whose weights are in a .caffemodel; `net` is one of other widths."""
    try:
        net, layers = net or FCN8s(), read_caffemodel(path)
        for name, layer in net.named_children():
            for weight, values in zip(layer.parameters(), layers[name], strict=True):
                weight.data = torch.from_numpy(values.copy()).view(weight.shape)
    except Exception as error:  # of many kinds
        fail(f"--segmenter {path} is no .caffemodel of FCN-8s ({error or type(error).__name__})")
    return net
