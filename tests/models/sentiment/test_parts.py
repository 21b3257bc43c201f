"""The parts of the sentiment classifier, each against what it means."""

import math

import pytest
import torch
from torch.nn import functional as F

from tenfold.models.sentiment.attention import Block, across
from tenfold.models.sentiment.cbam import Cbam, ChannelGate, SpatialGate, masked_max, masked_mean
from tenfold.models.sentiment.image import DEVIATION, MEAN, ImageShape, Regions, ResNet, from_image_weights, tokens_of
from tenfold.models.sentiment.model import AttentionPool
from tenfold.models.sentiment.text import Bert, BiLstm, TextShape, from_bert

NAMED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TOLERANCE = 1e-6  # float32: the same sums in another order


def padded(places, more, channels=3):
    """Features of `places` real places, and the same with `more` of padding that holds large numbers."""
    x = torch.randn(2, channels, places)
    junk = torch.cat([x, torch.full((2, channels, more), 1e3)], 2)
    real = torch.arange(places + more)[None, None] < places
    return x, junk, real.expand(2, 1, -1)


@pytest.mark.parametrize("more", [0, 1, 5])
@pytest.mark.parametrize("places", [1, 4])
def test_masked_pools_ignore_padding(places, more):
    x, junk, real = padded(places, more)
    torch.testing.assert_close(masked_mean(junk, real), x.mean(2))
    assert torch.equal(masked_max(junk, real), x.amax(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pools_of_nothing_are_zero(dtype):
    x, nothing = torch.randn(2, 3, 4, dtype=dtype), torch.zeros(2, 1, 4, dtype=torch.bool)
    assert masked_mean(x, nothing).abs().max() == 0
    assert masked_max(x, nothing).abs().max() == 0
    assert AttentionPool(4)(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool)).abs().max() == 0


def test_attention_pooling_ignores_padding():
    pool, x = AttentionPool(8), torch.randn(2, 5, 8)
    real = torch.arange(9)[None] < 5
    junk = torch.cat([x, torch.full((2, 4, 8), 50.0)], 1)
    torch.testing.assert_close(pool(junk, real.expand(2, -1)), pool(x, torch.ones(2, 5, dtype=torch.bool)))


def test_cbam_is_what_the_paper_says():
    """Two channels, three places, computed by hand: M_c = s(MLP(avg) + MLP(max)), then M_s = s(conv7([avg; max]))."""
    cbam = Cbam(2, "both", dims=1)
    first, last = cbam.channel.mlp[0], cbam.channel.mlp[2]
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, 2.0]]))
        first.bias.zero_()
        last.weight.copy_(torch.tensor([[1.0], [-1.0]]))
        last.bias.zero_()
        cbam.spatial.conv.weight.zero_()
        cbam.spatial.conv.weight[0, 0, 3] = 1.0  # the mean over channels of the place itself
        cbam.spatial.conv.weight[0, 1, 4] = 2.0  # the largest channel of the next
        cbam.spatial.conv.bias.zero_()
    x = [[1.0, 2.0, 3.0], [0.0, -1.0, 4.0]]

    def sigmoid(value):
        return 1 / (1 + math.exp(-value))

    hidden = (2.0 + 2 * 1.0) + (3.0 + 2 * 4.0)  # of the means 2 and 1, and of the maxima 3 and 4; ReLU takes nothing
    gates = sigmoid(hidden), sigmoid(-hidden)
    gated = [[gates[c] * value for value in x[c]] for c in range(2)]
    means = [(gated[0][i] + gated[1][i]) / 2 for i in range(3)]
    tops = [max(gated[0][i], gated[1][i]) for i in range(3)] + [0.0]
    places = [sigmoid(means[i] + 2 * tops[i + 1]) for i in range(3)]
    expected = [[x[c][i] + gated[c][i] * places[i] for i in range(3)] for c in range(2)]
    out = cbam(torch.tensor([x]), torch.ones(1, 1, 3, dtype=torch.bool))
    torch.testing.assert_close(out, torch.tensor([expected]))


@pytest.mark.parametrize("which", ["none", "channel", "spatial", "both"])
def test_cbam_ignores_padding(which):
    cbam = Cbam(3, which, dims=1)
    x, junk, real = padded(5, 4)
    out = cbam(junk, real)
    torch.testing.assert_close(out[..., :5], cbam(x, torch.ones(2, 1, 5, dtype=torch.bool)))
    assert out[..., 5:].abs().max() == 0


def test_gates_of_pictures_have_their_shapes():
    x, real = torch.randn(2, 16, 5, 7), torch.ones(2, 1, 5, 1, dtype=torch.bool)
    assert ChannelGate(16)(x, real).shape == (2, 16, 1, 1)
    assert SpatialGate(2)(x, real).shape == (2, 1, 5, 7)


def test_a_packed_lstm_is_each_text_by_itself():
    lstm = BiLstm(8, 2, 0.0)
    x, lengths = torch.randn(3, 6, 8), torch.tensor([6, 1, 4])
    out = lstm(x, lengths)
    for i, length in enumerate(lengths.tolist()):
        alone = lstm(x[i : i + 1, :length], torch.tensor([length]))
        torch.testing.assert_close(out[i, :length], alone[0], atol=TOLERANCE, rtol=0)
        assert out[i, length:].abs().sum() == 0


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("column", range(2))
def test_a_region_lands_in_its_token(row, column):
    """Only the channels of one place are set, each to a number of its own; they must be one token, in order."""
    map = torch.zeros(1, 4, 3, 2)
    map[0, :, row, column] = torch.arange(1.0, 5.0)
    tokens = tokens_of(map)
    assert tokens[0, row * 2 + column].tolist() == [1, 2, 3, 4]
    assert tokens.sum() == 10


# near: tokens away that the largest change may be; convolutions see over the border of a region.
@pytest.mark.parametrize(
    ("shape", "near"),
    [(ImageShape("small", 56), 1), (ImageShape("vit", 48, 16, 32, 0, 2, 64), 0)],
    ids=["small", "vit"],
)
def test_what_changes_in_a_picture_changes_its_token_most(shape, near):
    regions = Regions(shape, 16).eval()
    side, stride = shape.size // shape.stride, shape.stride
    plain = torch.zeros(1, 3, shape.size, shape.size)
    for row, column in ((0, 0), (1, side - 1), (side - 1, 1)):
        marked = plain.clone()
        marked[..., row * stride : (row + 1) * stride, column * stride : (column + 1) * stride] = 3.0
        change = (regions.encoder(marked) - regions.encoder(plain)).abs().sum(-1)[0]
        found = divmod(int(change.argmax()), side)
        assert max(abs(found[0] - row), abs(found[1] - column)) <= near
    black = torch.zeros(1, 3, shape.size, shape.size, dtype=torch.uint8)
    assert regions(black).shape == (1, shape.tokens, 16)
    assert torch.equal(regions.normal(black)[0, :, 0, 0], -torch.tensor(MEAN) / torch.tensor(DEVIATION))


def test_each_token_looks_across():
    """Two tokens of a picture, three of a text of which the last is padding."""
    real = torch.tensor([[True, True, True, True, False]])
    sees = across(real, 2)[0, 0].int().tolist()
    assert sees == [[1, 0, 1, 1, 0], [0, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 0, 1]]
    assert Block(8, 2, 16, 1e-5, 0.0)(torch.randn(1, 5, 8), across(torch.zeros_like(real), 2)).isfinite().all()


def test_bert_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    shape = TextShape(50, 32, 2, 4, 64, positions=20)
    told = transformers.BertConfig(**NAMED, vocab_size=50, max_position_embeddings=20)
    theirs = transformers.BertModel(told, add_pooling_layer=False).eval()
    assert TextShape.of_bert(told.to_dict()) == shape
    ours = Bert(shape, 0.1).eval()
    ours.load_state_dict(from_bert(theirs.state_dict()))
    ids, real = torch.randint(0, 50, (2, 7)), torch.arange(7)[None] < torch.tensor([[7], [4]])
    with torch.no_grad():
        expected = theirs(ids, attention_mask=real.long()).last_hidden_state
        torch.testing.assert_close(ours(ids, real)[real], expected[real], atol=1e-5, rtol=1e-5)


BERT = {
    **{"model_type": "bert", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 64, "max_position_embeddings": 20},
}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "roberta"}, "is a 'roberta'; allowed: bert"),
        ({"hidden_act": "relu"}, "hidden_act of the text encoder is 'relu'; allowed: gelu"),
        ({"position_embedding_type": "relative_key"}, "'relative_key'; allowed: absolute"),
        ({"hidden_size": None, "vocab_size": "many"}, "no whole number for vocab_size, hidden_size"),
    ],
)
def test_encoders_that_are_computed_in_another_way_are_refused(change, word):
    assert TextShape.of_bert(BERT) == TextShape(50, 32, 2, 4, 64, positions=20)
    with pytest.raises(ValueError, match=word):
        TextShape.of_bert(BERT | change)


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        (ImageShape("alexnet"), "image encoder is 'alexnet'; allowed: small"),
        (ImageShape("vit", patch=0), "patch of the image encoder is 0; allowed: from 1"),
        (ImageShape("vit", layers=-1), "layers of the image encoder is -1; allowed: from 0"),
        (ImageShape("vit", 32, 16, 30, heads=4), r"width of the image encoder is 30; allowed: a multiple of its heads"),
        (ImageShape("small", 2048), "size of pictures is 2048; allowed: a multiple of 8, up to 1024"),
        (TextShape(0, 32, 1, 4, 64), "vocab of the text encoder is 0; allowed: from 1"),
        (TextShape(5, 32, -1, 4, 64), "layers of the text encoder is -1; allowed: from 0"),
        (TextShape(5, 12, 1, 4, 64), "width of the text encoder is 12; allowed: a multiple of twice its heads"),
    ],
)
def test_sizes_that_make_no_encoder(shape, word):
    with pytest.raises(ValueError, match=word):
        shape.check()


def test_vit_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    told = transformers.ViTConfig(**NAMED, image_size=48, patch_size=16)
    theirs = transformers.ViTModel(told, add_pooling_layer=False).eval()
    ours = Regions(ImageShape("vit", 48, 16, 32, 2, 4, 64), 8).encoder.eval()
    ours.load_state_dict(from_image_weights("vit", theirs.state_dict()))
    pictures = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = theirs(pictures).last_hidden_state[:, 1:]
        torch.testing.assert_close(ours(pictures), expected, atol=1e-5, rtol=1e-5)


# Parameters without the 1000 classes, from the papers' tables of layers.
@pytest.mark.parametrize(("kind", "count", "channels"), [("resnet18", 11_176_512, 512), ("resnet50", 23_508_032, 2048)])
def test_resnets_have_the_size_of_their_namesakes(kind, count, channels):
    net = ResNet(kind)
    assert sum(p.numel() for p in net.parameters()) == count
    assert net.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 4, channels)


def test_weights_with_torchvisions_names_are_taken():
    net = ResNet("resnet18")
    theirs = net.state_dict() | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    assert from_image_weights("resnet18", theirs).keys() == net.state_dict().keys()
    assert {"layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "layer4.1.bn2.running_var"} <= theirs.keys()


def test_the_mlp_of_a_gate_sees_both_pools():
    gate = ChannelGate(32, 16)
    x = torch.randn(1, 32, 6)
    real = torch.ones(1, 1, 6, dtype=torch.bool)
    expected = torch.sigmoid(gate.mlp(x.mean(2)) + gate.mlp(F.adaptive_max_pool1d(x, 1)[..., 0]))
    torch.testing.assert_close(gate(x, real)[..., 0], expected)
