"""FCN-8s on VGG-16 (Long, Shelhamer, Darrell 2015), and its public Cityscapes weights, read without Caffe.

The network is that of the pix2pix authors' scripts/eval_cityscapes/caffemodel/deploy.prototxt, layer by layer and by
its names; their fcn-8s-cityscapes.caffemodel is a protobuf message of the types in caffe.proto.
"""

import itertools
import mmap
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import vgg16

CONVS = (2, 2, 3, 3, 3)  # convolutions before each pooling
MEAN = (72.78044, 83.21195, 73.45286)  # of blue, green and red, which the authors' cityscapes.py takes off


class FCN8s(nn.Module):
    """Scores at strides 32, 16 and 8, enlarged by learned filters and added up, cropped to the image.

    x (N, 3, H, W), BGR from 0 to 255 less MEAN for the public weights -> scores (N, classes, H, W).
    """

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
        for level, count in enumerate(CONVS, 1):
            for i in range(1, count + 1):
                x = F.relu(self.get_submodule(f"conv{level}_{i}")(x))
            x = F.max_pool2d(x, 2, ceil_mode=True)  # Caffe rounds up
            pooled.append(x)
        for layer in (self.fc6, self.fc7):
            x = F.dropout(F.relu(layer(x)), training=self.training)
        x = self.upscore2(self.score_fr(x))
        x = self.upscore_pool4(x + crop(self.score_pool4(pooled[3]), 5, x))
        x = self.upscore8(x + crop(self.score_pool3(pooled[2]), 9, x))
        return x[:, :, 31 : 31 + high, 31 : 31 + wide]


def crop(x, offset, like):
    """x (N, C, H, W) from `offset` on, as large as `like`."""
    return x[:, :, offset : offset + like.shape[2], offset : offset + like.shape[3]]


def init_weights(net, pretrained):
    """He's normal weights, none in the scores, bilinear enlarging; `pretrained`: VGG-16's of ImageNet, as published.

    torchvision's VGG-16 has them for RGB from 0 to 1, less mean and divided by deviation; they are downloaded once.
    """
    for name, layer in net.named_children():
        nn.init.kaiming_normal_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        if name.startswith("score"):
            nn.init.zeros_(layer.weight)
        if name.startswith("upscore"):
            size = layer.kernel_size[0]
            ramp = 1 - (torch.arange(size) - (size - 1) / 2).abs() / (size / 2)
            with torch.no_grad():
                layer.weight.copy_(torch.eye(layer.in_channels)[:, :, None, None] * ramp[:, None] * ramp)
    if pretrained:
        vgg = vgg16(weights="DEFAULT")
        theirs = [layer for layer in (*vgg.features, *vgg.classifier[:-1]) if hasattr(layer, "weight")]
        with torch.no_grad():
            for ours, layer in zip(net.children(), theirs):
                ours.weight.copy_(layer.weight.view_as(ours.weight))  # fc6 looks at 7x7 as if it were flat
                ours.bias.copy_(layer.bias)
    return net


# -- .caffemodel -----------------------------------------------------------------------------------------------------


def read_varint(data, at):
    """A number of seven bits a byte, lowest first, at a place in `data`. -> the number, and where it ends."""
    value = 0
    for i in range(10):
        if at + i >= len(data):
            raise ValueError("it is cut off")
        value |= (data[at + i] & 127) << 7 * i
        if data[at + i] < 128:
            return value & 2**64 - 1, at + i + 1
    raise ValueError("a number has no end")


def fields(data):
    """Yields number, wire type and value of each field of a protobuf message: an int of type 0, else a memoryview."""
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = read_varint(data, at)
            yield number, kind, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError("it is no protobuf message")
        size, at = read_varint(data, at) if kind == 2 else (8 if kind == 1 else 4, at)
        if size > len(data) - at:
            raise ValueError("it is cut off")
        yield number, kind, data[at : at + size]
        at += size


def unpack(data):
    """The numbers that are packed into a field."""
    found, at = [], 0
    while at < len(data):
        number, at = read_varint(data, at)
        found.append(number)
    return found


def read_blob(message):
    """A BlobProto as an array; its floats or doubles lie packed in one field, and are not copied, or in one each."""
    values, dtype, shape, old_shape = bytearray(), "<f4", None, [0, 0, 0, 0]
    for number, kind, value in fields(message):
        if number in (5, 8):  # data, double_data
            dtype = "<f4" if number == 5 else "<f8"
            if kind == 2 and not values:
                values = value
            else:
                values = bytearray(values) if isinstance(values, memoryview) else values
                values += value
        elif number == 7:  # shape
            shape = [dim for _, kind, dims in fields(value) for dim in (unpack(dims) if kind else [dims])]
        elif number in (1, 2, 3, 4):  # num, channels, height, width, of old files
            old_shape[number - 1] = value
    return np.frombuffer(values, dtype).reshape(old_shape if shape is None else shape)


def read_caffemodel(path):
    """{layer: [weight, bias]} of a NetParameter, of both kinds that Caffe has written; the file stays on the disk."""
    with open(path, "rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    layers = {}
    for number, kind, layer in fields(data):
        if (number, kind) in ((100, 2), (2, 2)):  # LayerParameter, V1LayerParameter
            name_field, blob_field = (1, 7) if number == 100 else (4, 6)
            found = [(number, value) for number, kind, value in fields(layer) if kind == 2]
            name = b"".join(value for number, value in found if number == name_field).decode()
            if blobs := [read_blob(value) for number, value in found if number == blob_field]:
                layers[name] = blobs
    return layers


def load(path):
    """The FCN-8s whose weights are in a .caffemodel, as wide and of as many classes as they are, in evaluation mode.

    What is no such file, is cut off, lacks a layer or has one of another shape ends in one sentence.
    """
    try:
        layers = {name.removesuffix("_cs"): blobs for name, blobs in read_caffemodel(path).items()}
        with torch.device("meta"):  # so that a wrong shape costs no memory
            net = FCN8s()
        if missing := [name for name, _ in net.named_children() if name not in layers]:
            raise ValueError(f"it has no layer {missing[0]}")
        first = [layers[name][0].shape[0] for name in (*(f"conv{i}_1" for i in range(1, 6)), "fc6", "score_fr")]
        with torch.device("meta"):
            net = FCN8s(first[6], first[:5], first[5])
        weights = {}
        for name, weight in net.named_parameters():
            layer, _, kind = name.partition(".")
            blob = dict(zip(("weight", "bias"), layers[layer])).get(kind)
            if blob is None or squeezed(blob.shape) != squeezed(weight.shape):
                found = "missing" if blob is None else f"of shape {list(blob.shape)}, not {list(weight.shape)}"
                raise ValueError(f"the {kind} of {layer} is {found}")
            weights[name] = torch.from_numpy(blob.astype(np.float32).reshape(weight.shape))
        net.load_state_dict(weights, assign=True)
    except Exception as error:
        sys.exit(f"bench: {path} cannot be used as a .caffemodel of FCN-8s ({error or type(error).__name__})")
    return net.eval()


def squeezed(shape):
    """A shape without the ones that old files put before it."""
    return [*itertools.dropwhile(lambda size: size == 1, shape)]
