"""Weights of torchvision and Hugging Face, of the right layout with random values, in our encoder."""

from types import SimpleNamespace

import pytest
import torch
import torchvision.models
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification, ViTModel

from models.efficientnet import GREY_MEAN, GREY_STD, SCALE_STAGES, EfficientNetScales
from models.pretrained import load_efficientnet_weights, load_vit_weights
from models.vit import ViT
from utils.config import BadFile, UserError

TINY = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "image_size": 56,
        "patch_size": 14}


def randomise(module):
    """Every weight away from its initial value, so that none is taken for granted."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def tokens():
    return torch.randn(2, 16, 192, generator=torch.Generator().manual_seed(1))


def our_vit():
    return SimpleNamespace(vit=ViT("tiny", in_channels=8, grid=4).eval())


def save_dinov2(folder, **options):
    model = randomise(Dinov2Model(Dinov2Config(**TINY | options)))
    model.save_pretrained(folder)
    return model


def test_dinov2_layers_compute_the_same_tokens(tmp_path):
    """Layer scales folded into the projections are exact; position embeddings lose the class token's."""
    theirs, ours = save_dinov2(tmp_path), our_vit()
    matched, unmatched = load_vit_weights(ours, tmp_path)
    with torch.no_grad():
        expected = theirs.layernorm(theirs.encoder(tokens()).last_hidden_state)
        torch.testing.assert_close(ours.vit.encode(tokens()), expected, rtol=1e-5, atol=1e-5)
    position = theirs.embeddings.position_embeddings[0, 1:]
    torch.testing.assert_close(ours.vit.position[0].flatten(1).T, position)
    assert len(matched) == 12 * 16 + 3
    assert all("embeddings" in name for name in unmatched)


@pytest.mark.parametrize("kind", [ViTModel, ViTForImageClassification])
@pytest.mark.parametrize("file", ["folder", "model.safetensors"])
def test_vit_layers_compute_the_same_tokens(kind, file, tmp_path):
    """With or without a head, from the folder or from its file."""
    theirs, ours = randomise(kind(ViTConfig(**TINY, intermediate_size=768))), our_vit()
    theirs.save_pretrained(tmp_path)
    load_vit_weights(ours, tmp_path if file == "folder" else tmp_path / file)
    body = getattr(theirs, "vit", theirs)
    with torch.no_grad():
        expected = tokens()
        for layer in body.layers:
            expected = layer(expected)
        torch.testing.assert_close(ours.vit.encode(tokens()), body.layernorm(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("old", [False, True])
def test_names_of_older_and_newer_files_load_alike(old, tmp_path):
    """Hugging Face renamed the parts of its layers; files of both kinds are about."""
    new_parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj",
                 "up": "mlp.fc1", "down": "mlp.fc2"}
    old_parts = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.dense",
                 "up": "intermediate.dense", "down": "output.dense"}
    generator = torch.Generator().manual_seed(0)
    state = {"vit.embeddings.position_embeddings": torch.randn(1, 17, 192, generator=generator)}
    for i in range(12):
        layer = f"vit.encoder.layer.{i}." if old else f"vit.layers.{i}."
        for part, name in (old_parts if old else new_parts).items():
            rows, columns = {"up": (768, 192), "down": (192, 768)}.get(part, (192, 192))
            prefix = layer + ("" if part in ("up", "down") else "attention.") + name
            state[f"{prefix}.weight"] = torch.randn(rows, columns, generator=generator)
            state[f"{prefix}.bias"] = torch.randn(rows, generator=generator)
        for name in ("layernorm_before", "layernorm_after"):
            state[f"{layer}{name}.weight"] = state[f"{layer}{name}.bias"] = torch.ones(192)
    state["vit.layernorm.weight"] = state["vit.layernorm.bias"] = torch.ones(192)
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours = our_vit()
    _, unmatched = load_vit_weights(ours, tmp_path / "pytorch_model.bin")
    layer = "vit.encoder.layer.11.output.dense" if old else "vit.layers.11.mlp.fc2"
    assert not unmatched
    assert torch.equal(ours.vit.layers[11].mlp.fc2.weight, state[f"{layer}.weight"])


def test_swiglu_is_refused(tmp_path):
    """A gated layer has no plain equivalent; loading half of it would be silent nonsense."""
    save_dinov2(tmp_path, use_swiglu_ffn=True, num_hidden_layers=1)
    with pytest.raises(UserError, match="SwiGLU.*VIT_WEIGHTS"):
        load_vit_weights(our_vit(), tmp_path)
    with pytest.raises(UserError, match="SwiGLU.*VIT_WEIGHTS"):
        load_vit_weights(our_vit(), tmp_path / "model.safetensors")


def test_another_size_is_refused(tmp_path):
    """Both constants that must agree are named."""
    save_dinov2(tmp_path, hidden_size=128, num_attention_heads=2, num_hidden_layers=1)
    with pytest.raises(UserError, match="VIT and VIT_WEIGHTS|VIT_WEIGHTS must be the model that VIT names"):
        load_vit_weights(our_vit(), tmp_path)


def test_efficientnet_features_on_grey_equal_torchvisions_on_grey_as_colour(tmp_path):
    """Summing the stem's colours is exact for a grey image; both see it normalised."""
    theirs = randomise(torchvision.models.efficientnet_b0(weights=None))
    torch.save(theirs.state_dict(), tmp_path / "b0.pth")
    ours = SimpleNamespace(encoder=EfficientNetScales("b0").eval())
    _, unmatched = load_efficientnet_weights(ours, tmp_path / "b0.pth")
    assert {name.split(".")[0] for name in unmatched if "tracked" not in name} == {"features", "classifier"}
    assert all(name.startswith(("features.8.", "classifier.")) for name in unmatched if "tracked" not in name)

    grey = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    x, expected = ((grey - GREY_MEAN) / GREY_STD).repeat(1, 3, 1, 1), []
    with torch.no_grad():
        for i, stage in enumerate(theirs.features[:-1]):
            x = stage(x)
            expected += [x] if i in SCALE_STAGES else []
        torch.testing.assert_close(ours.encoder(grey), expected, rtol=1e-4, atol=1e-4)


def test_files_that_cannot_be_used_name_themselves_and_their_constant(tmp_path):
    """Missing, no tensors at all, and the weights of another network."""
    encoder = SimpleNamespace(encoder=EfficientNetScales("b0"))
    with pytest.raises(UserError, match="gone.pth.*EFFICIENTNET_WEIGHTS"):
        load_efficientnet_weights(encoder, tmp_path / "gone.pth")
    with pytest.raises(UserError, match="config.json.*VIT_WEIGHTS"):
        load_vit_weights(our_vit(), tmp_path)
    torch.save({"epoch": 3}, tmp_path / "words.pth")
    (tmp_path / "noise.pth").write_bytes(b"no pickle at all")
    (tmp_path / "noise.safetensors").write_bytes(b"no tensors at all")
    for name in ("words.pth", "noise.pth"):
        with pytest.raises(BadFile, match=f"{name}.*EFFICIENTNET_WEIGHTS"):
            load_efficientnet_weights(encoder, tmp_path / name)
    with pytest.raises(BadFile, match="noise.safetensors.*VIT_WEIGHTS"):
        load_vit_weights(our_vit(), tmp_path / "noise.safetensors")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="other.pth: has no features.*EFFICIENTNET names"):
        load_efficientnet_weights(encoder, tmp_path / "other.pth")
