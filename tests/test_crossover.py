"""Backbones cross over: random weights in the layouts of other libraries and of other scripts' runs."""

from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision.models
from conftest import grid_coords, narrow_resnet
from monai.networks.nets import VISTA3D, SegResNet, SegResNetDS2
from safetensors.torch import save_file
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTModel,
)

from datasets.tokens import tokenize
from models.efficientnet import SCALE_STAGES, EfficientNetScales
from models.mil import StudyClassifier, build_pooler
from models.photo import build_photo_model, load_torchvision_weights
from models.pretrained import load_efficientnet_weights
from models.resnet import SliceResNet
from models.simclr import SimCLR
from models.slice_nets import build_slice_model, encoder_of
from models.token_unet import TokenUNet, pack
from models.token_vit import TokenViT
from models.vista import Vista
from utils.checkpoint import load_backbone, load_part
from utils.config import UserError
from utils.foreign import familiar_names

VIT = {"size": "custom", "dim": 48, "depth": 4, "heads": 2}
HF_B0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "image_size": 224}


def randomise(network, seed=0):
    """Weights and statistics away from their first values, so that none is taken for granted."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(0.5 + noise if "running_var" in name else value + 0.1 * (noise - 0.5))
    return network.eval()


def images(channels, size=64):
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def grey_of(network):
    """A grey image as our network and as one of colour sees it, on the scale of each."""
    x = images(1)
    mean, std = getattr(network, "mean", 0.449), getattr(network, "std", 0.226)
    return x, ((x - mean) / std).expand(-1, 3, -1, -1)


def save(network, path):
    torch.save(network.state_dict(), path)
    return path


def save_run(network, path, kind="any"):
    """As a training script writes it, with averages of the weights."""
    torch.save({"kind": kind, "format_version": 1, "model_state_dict": network.state_dict(),
                "ema_state_dict": network.state_dict(), "epoch": 1}, path)
    return path


def assert_close(ours, theirs):
    """Equal but for rounding, which adds up over fifty layers to parts of the largest value."""
    for first, second in zip(ours, theirs, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=2e-5 * second.abs().max().item())


# ------------------------------------------------------------------- ResNets

def hf_resnet(word):
    options = {"depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "layer_type": "basic"} \
        if word == "resnet18" else {}
    return ResNetForImageClassification(ResNetConfig(**options))


LIBRARIES = {"torchvision": lambda word: getattr(torchvision.models, word)(weights=None), "hf": hf_resnet,
             "timm": lambda word: timm.create_model(word)}


@pytest.mark.parametrize("library, word", [
    ("torchvision", "resnet18"), ("hf", "resnet18"), ("hf", "resnet50"), ("timm", "resnet50")])
def test_resnets_of_three_libraries_start_slices_and_photographs(library, word, tmp_path):
    """--init takes each by its names, and features are its own; grey sees the sum of the colour planes."""
    peer = randomise(LIBRARIES[library](word))
    if library == "hf":
        peer.save_pretrained(tmp_path / "weights")                      # a folder, as it is published
    path = tmp_path / "weights" if library == "hf" else save(peer, tmp_path / "weights.pth")

    def features(x):
        if library == "hf":
            return peer.resnet(x).pooler_output.flatten(1)
        if library == "timm":
            return peer.forward_head(peer.forward_features(x), pre_logits=True)
        return torch.nn.Sequential(*list(peer.children())[:-1])(x).flatten(1)

    photo, slices = build_photo_model(word, 0).eval(), SliceResNet(word, 3).eval()
    _, unmatched = load_backbone(photo, path)
    assert unmatched == []
    _, unmatched = load_backbone(slices, path, optional=("head.",))
    assert unmatched == ["mean", "std", "head.weight", "head.bias"]
    grey, colour = grey_of(slices)
    with torch.no_grad():
        assert_close(photo.features(images(3)), features(images(3)))
        assert_close(slices.features(grey), features(colour))


@pytest.mark.parametrize("kind", ["classify", "segment", "multitask"])
@pytest.mark.parametrize("run", ["simclr", "hvit"])
def test_a_photograph_run_starts_every_task_on_slices(run, kind, tmp_path):
    """SimCLR's backbone, or a classifier's, whose layers stand under names of their own."""
    source = randomise(build_photo_model("resnet18", 5 if run == "hvit" else 0))
    path = save_run(SimCLR(source) if run == "simclr" else source, tmp_path / "run.pt", run)
    model = build_slice_model(kind, ["a", "b"], [] if kind == "classify" else ["cord"], "resnet18").eval()
    encoder = encoder_of(model)
    matched, unmatched = load_part(model, encoder, path, optional=("head.",))
    grey, colour = grey_of(encoder)
    encoder.head = torch.nn.Identity()
    with torch.no_grad():
        assert_close(encoder(grey), source.features(colour))
    assert set(matched) | set(unmatched) == set(build_slice_model(
        kind, ["a", "b"], [] if kind == "classify" else ["cord"], "resnet18").state_dict())


@pytest.mark.parametrize("theirs, ours", [("resnet34", "resnet18"), ("resnet18", "resnet34")])
def test_another_depth_of_resnet_is_refused_in_one_line(theirs, ours, tmp_path):
    """The blocks of a resnet34 begin like those of a resnet18: half of it would load in silence."""
    path = save(getattr(torchvision.models, theirs)(weights=None), tmp_path / "weights.pth")
    for model in (build_photo_model(ours, 0), SliceResNet(ours)):
        with pytest.raises(UserError, match="deeper network|90% are needed") as error:
            load_backbone(model, path)
        assert "\n" not in str(error.value) and "weights.pth" in str(error.value)


# -------------------------------------------------------------- EfficientNets

def symmetric(peer):
    """Hugging Face's EfficientNet with the padding of torchvision's, the one thing in which they differ."""
    for module in peer.modules():
        if isinstance(module, torch.nn.ZeroPad2d):
            side = max(module.padding)
            module.padding = (side,) * 4
    return peer


def efficientnet(library):
    """A b0 of that library, and what gives its features."""
    if library == "torchvision":
        peer = randomise(torchvision.models.efficientnet_b0(weights=None))
        return peer, lambda x: peer.avgpool(peer.features(x)).flatten(1)
    if library == "timm":
        peer = randomise(timm.create_model("efficientnet_b0"))
        return peer, lambda x: peer.forward_head(peer.forward_features(x), pre_logits=True)
    peer = symmetric(randomise(EfficientNetForImageClassification(EfficientNetConfig(**HF_B0))))
    return peer, lambda x: peer.efficientnet(x).pooler_output


@pytest.mark.parametrize("library", ["torchvision", "hf", "timm"])
def test_efficientnets_of_three_libraries_start_photographs_and_xrays(library, tmp_path):
    """By --init or by EFFICIENTNET_WEIGHTS and HVIT_WEIGHTS, to the same features."""
    peer, features = efficientnet(library)
    if library == "hf":
        peer.save_pretrained(tmp_path / "weights")
    path = tmp_path / "weights" if library == "hf" else save(peer, tmp_path / "weights.pth")
    photo, by_constant = (build_photo_model("efficientnet_b0", classes) for classes in (0, 3))
    assert load_backbone(photo.eval(), path)[1] == []
    load_torchvision_weights(by_constant.eval(), path)
    with torch.no_grad():
        expected = features(images(3))
        assert_close(photo(images(3)), expected)
        assert_close(by_constant.features(images(3)), expected)

    xray, other = EfficientNetScales("b0").eval(), EfficientNetScales("b0").eval()
    assert load_backbone(xray, path)[1] == []
    load_efficientnet_weights(SimpleNamespace(encoder=other), path)
    grey, x = grey_of(xray)
    maps = []
    with torch.no_grad():
        for i, stage in enumerate(photo.network.features[:-1]):
            x = stage(x)
            maps += [x] if i in SCALE_STAGES else []
        assert_close(xray(grey), maps)
        assert_close(other(grey), maps)


@pytest.mark.parametrize("library", ["hf", "timm"])
@pytest.mark.parametrize("number", range(8))
def test_every_efficientnet_has_torchvisions_names_and_shapes(library, number):
    """Hugging Face counts blocks through, and the stages' lengths differ from b0 to b7."""
    wide = [(1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8), (1.6, 2.2), (1.8, 2.6),
            (2.0, 3.1)][number]
    with torch.device("meta"):
        theirs = timm.create_model(f"efficientnet_b{number}") if library == "timm" else \
            EfficientNetForImageClassification(EfficientNetConfig(
                width_coefficient=wide[0], depth_coefficient=wide[1],
                hidden_dim=8 * round(160 * wide[0]), image_size=224))
        ours = getattr(torchvision.models, f"efficientnet_b{number}")(weights=None).features
    found = {name.removeprefix("features."): value.shape
             for name, value in familiar_names(theirs.state_dict()).items() if name.startswith("features.")}
    assert found == {name: value.shape for name, value in ours.state_dict().items()}


def test_another_efficientnet_is_refused_in_one_line(tmp_path):
    """A b1 begins as a b0 does, in its shapes, and goes on."""
    path = save(torchvision.models.efficientnet_b1(weights=None), tmp_path / "weights.pth")
    with pytest.raises(UserError, match="weights.pth: has features.1.1.*deeper network"):
        load_backbone(EfficientNetScales("b0"), path)
    with pytest.raises(UserError, match="EFFICIENTNET_WEIGHTS must be the model that EFFICIENTNET names"):
        load_efficientnet_weights(SimpleNamespace(encoder=EfficientNetScales("b0")), path)
    with pytest.raises(UserError, match="HVIT_WEIGHTS must be the model that HVIT_MODEL names"):
        load_torchvision_weights(build_photo_model("efficientnet_b0", 0), path)


# ------------------------------------------------------------ other image networks

@pytest.mark.parametrize("word", ["hvit_tiny", "swin_t", "resnet18", "efficientnet_b0"])
def test_simclr_starts_a_classifier_of_many_classes(word, tmp_path):
    """A head of thousands of classes weighs more than a tenth, and is no part of the backbone."""
    source = randomise(build_photo_model(word, 0))
    path = save_run(SimCLR(source), tmp_path / "simclr.pt")
    model = build_photo_model(word, 3000).eval()
    matched, unmatched = load_backbone(model, path, optional=("head.",))
    assert matched and all(name.startswith("head.") for name in unmatched)
    with torch.no_grad():
        assert_close(model.features(images(3)), source(images(3)))


@pytest.mark.parametrize("network", [
    lambda: ViTModel(ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=2)),
    lambda: timm.create_model("vit_tiny_patch16_224", depth=2),
    lambda: SegResNet(spatial_dims=3, in_channels=1, out_channels=8, init_filters=8)])
@pytest.mark.parametrize("target", [
    lambda: build_photo_model("hvit_tiny", 0), lambda: SliceResNet("resnet18"),
    lambda: EfficientNetScales("b0"), lambda: TokenViT(**VIT)])
def test_layouts_that_do_not_fit_give_one_clear_line(network, target, tmp_path):
    """What is missing, what the file has, and what to do."""
    path = save(network(), tmp_path / "weights.pth")
    message = r"weights.pth: only \d+% .*missing: .*the file has: .*use the same model settings, or --remove"
    with pytest.raises(UserError, match=message) as error:
        load_backbone(target(), path)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------- volumes: MONAI and tokens

def vista(encoder, seed=0, dims=3, **vit):
    torch.manual_seed(seed)
    return Vista(dims, encoder, 8, num_classes=5, embedding=4, head_width=8,
                 vit=TokenViT(**{**VIT, **vit}) if encoder == "token_vit" else None)


@pytest.mark.parametrize("layout", ["segresnet", "segresnetds2", "vista3d"])
def test_monais_networks_start_vista_without_a_word_about_prefixes(layout, tmp_path):
    """SegResNet, SegResNetDS2 and VISTA3D's file, whose encoder stands under image_encoder."""
    if layout == "segresnet":
        peer = SegResNet(spatial_dims=3, in_channels=1, out_channels=8, init_filters=8)
    else:
        peer = SegResNetDS2(spatial_dims=3, in_channels=1, out_channels=8, init_filters=8, dsdepth=1,
                            blocks_down=(1, 2, 2, 4, 4), norm="instance")
    peer = randomise(peer)
    whole = VISTA3D(peer, torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)) if layout == "vista3d" else peer
    model = vista("segresnet" if layout == "segresnet" else "vista3d").eval()
    _, unmatched = load_part(model, model.encoder, save(whole, tmp_path / "monai.pt"))
    assert {name.split(".")[0] for name in unmatched} == {"semantic", "instance"}
    x = torch.rand(1, 1, 16, 32, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = peer(x)
        assert_close(model.encoder(x), expected if layout == "segresnet" else expected[1])


def jepa_run(vit, path):
    """A pretraining run's file: the teacher beside student and predictor."""
    student = {f"encoder.{name}": torch.zeros_like(value) for name, value in vit.state_dict().items()}
    torch.save({"kind": "jepa", "teacher_state_dict": vit.state_dict(), "model_state_dict":
                {**student, "predictor.blocks.9.fc1.bias": torch.zeros(4)}}, path)
    return path


def token_runs(vit, tmp_path):
    """Runs that hold this transformer."""
    classifier = StudyClassifier(vit, build_pooler("average", vit.dim, 2, [], 8, 1, False), True)
    segmenter = Vista(3, "token_vit", 8, 5, 4, 8, vit=vit)
    return {"jepa": jepa_run(vit, tmp_path / "jepa.pt"), "mil": save_run(classifier, tmp_path / "mil.pt"),
            "vista": save_run(segmenter, tmp_path / "vista.pt")}


@pytest.mark.parametrize("source", ["jepa", "mil", "vista"])
def test_a_token_transformer_passes_between_pretraining_studies_and_microscopy(source, tmp_path):
    """Each of the three runs starts each of the three networks, whole, without --remove_prefix."""
    vit = randomise(TokenViT(**VIT))
    path = token_runs(vit, tmp_path)[source]
    alone, model = TokenViT(**VIT), vista("token_vit", seed=1)
    assert load_backbone(alone, path)[1] == []
    matched, unmatched = load_part(model, model.encoder.vit, path)
    assert (unmatched == []) == (source == "vista")
    for name, value in vit.state_dict().items():
        assert torch.equal(model.encoder.vit.state_dict()[name], value) and f"encoder.vit.{name}" in matched
        assert torch.equal(alone.state_dict()[name], value)
    for size in ({"dim": 64}, {"depth": 3}, {"depth": 5}):
        with pytest.raises(UserError, match="same model settings"):
            load_backbone(TokenViT(**{**VIT, **size}), path)


def test_tokens_are_cut_as_in_pretraining():
    """Another order of voxels or tokens would make the pretrained embedding meaningless."""
    image = torch.rand(2, 1, 8, 32, 48, generator=torch.Generator().manual_seed(0))
    tokens, places, cu_seqlens = pack(image, (2, 2, 3))
    assert torch.equal(tokens, torch.cat([tokenize(image[0, 0]), tokenize(image[1, 0])]))
    assert torch.equal(places, grid_coords((2, 2, 3)).repeat(2, 1)) and cu_seqlens.tolist() == [0, 12, 24]


def test_hidden_states_are_what_leaves_the_blocks():
    """Asked for after the last block, the norm of it is the features; without asking, the same features."""
    vit = randomise(TokenViT(**VIT))
    values = pack(torch.rand(2, 1, 8, 32, 16), (2, 2, 1))
    *hidden, features = vit(*values, after=(1, 1, 4))
    assert torch.equal(hidden[0], hidden[1]) and not torch.equal(hidden[1], hidden[2])
    assert torch.equal(features, vit(*values)) and torch.equal(vit.norm(hidden[2]), features)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_shallow_transformer_feeds_every_level(depth):
    """With fewer blocks than levels some levels share one; gradient reaches every parameter."""
    torch.manual_seed(0)
    model = TokenUNet(TokenViT(**{**VIT, "depth": depth}), 4)
    model(torch.rand(2, 1, 8, 32, 32)).sin().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_crops_of_a_batch_do_not_see_each_other():
    """Each is a sequence of its own: alone it has the same features."""
    model = randomise(vista("token_vit")).encoder
    x = torch.rand(3, 1, 8, 32, 32)
    with torch.no_grad():
        assert_close(model(x)[1:2], model(x[1:2]))


def test_slices_have_no_tokens():
    """One line that names the constants."""
    with pytest.raises(UserError, match="VISTA_ENCODER.*VISTA_SLICES to False"):
        vista("token_vit", dims=2)


# ------------------------------------------------------------------ as a user runs them

TOKENS = ["VISTA_ENCODER=token_vit", "STUDY_VIT=custom", "STUDY_VIT_DIM=48", "STUDY_VIT_DEPTH=2",
          "STUDY_VIT_HEADS=2"]


def test_a_jepa_run_starts_microscopy_whose_run_is_inferred_and_starts_studies(
        train_study, train_vista, script, volumes, tmp_path, capsys):
    """The scripts end to end: JEPA, Vista, inference, MIL from Vista, and JEPA again from MIL."""
    fast = ["--fast-dev-run"]
    jepa = train_study("jepa", "jepa", words=fast, labels=False) / "jepa_last.pt"
    capsys.readouterr()
    run = train_vista("tokens", *TOKENS, words=["--init", jepa, *fast]) / "vista3d_last.pt"
    size = len(torch.load(jepa, weights_only=True)["teacher_state_dict"])
    assert f"--init {jepa}: {size} weights of the backbone matched" in capsys.readouterr().out
    with pytest.raises(UserError, match="0% of the model's weights"):
        train_vista("wider", *TOKENS, "STUDY_VIT_DIM=64", words=["--init", jepa, *fast])
    script("infer_vista3d", "--checkpoint", run, "--output", tmp_path / "out.h5", "--input",
           volumes / "snemi3d" / "toy_inputs.h5", "--patch-size", 40, 48, 52, "--output-classes")
    assert (tmp_path / "out.h5").is_file()
    mil = train_study("mil", "mil", words=["--init", run, *fast]) / "mil_last.pt"
    train_study("jepa", "again", words=["--init", mil, *fast], labels=False)
    assert f"--init {mil}: {size} weights of the encoder matched, 0 not" in capsys.readouterr().out


def test_a_simclr_run_starts_slices_and_xrays(train_photo, train_spine, train, monkeypatch, capsys):
    """A ResNet's run starts a U-Net of slices, an EfficientNet's the X-rays' encoder; another is refused."""
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights=None, num_classes=1: narrow_resnet())
    fast = ["--fast-dev-run"]
    resnet = train_photo("simclr", "resnet", "HVIT_MODEL=resnet18", words=fast) / "simclr_last.pt"
    train_spine("segment", "cord", words=["--init", resnet, *fast])
    assert f"--init {resnet}: " in capsys.readouterr().out
    b0 = train_photo("simclr", "b0", "HVIT_MODEL=efficientnet_b0", words=fast) / "simclr_last.pt"
    run = train("xray", "USE_EMA=False", "MAX_LR=1e-12", words=["--init", b0, *fast])
    assert f"--init {b0}: " in capsys.readouterr().out
    theirs, ours = (torch.load(path, weights_only=True)["model_state_dict"]
                    for path in (b0, run / "longitudinal_mim_last.pt"))
    torch.testing.assert_close(ours["encoder.features.3.0.block.0.0.weight"],
                               theirs["backbone.network.features.3.0.block.0.0.weight"])
    with pytest.raises(UserError, match="of the model's weights"):
        train("other", words=["--init", resnet, *fast])


def test_safetensors_of_a_bare_backbone_start_a_task(train_spine, tmp_path, capsys):
    """--init with a published file and a prefix of its own, as --remove_prefix has it."""
    torch.manual_seed(0)
    state = {f"model.body.{name}": value for name, value in narrow_resnet().state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    words = ["--init", tmp_path / "model.safetensors", "--remove_prefix", "model.body.", "--fast-dev-run"]
    train_spine("classify", "prefix", words=words)
    assert "not: mean, std, head.weight, head.bias" in capsys.readouterr().out
    with pytest.raises(UserError, match="--remove_prefix"):
        train_spine("classify", "without", words=[*words[:2], "--fast-dev-run"])


def test_a_prefix_may_be_named_with_its_wrappers(tmp_path):
    """As the file's names show it: the wrapper alone, or the wrapper and what follows."""
    vit = randomise(TokenViT(**VIT))
    for wrapper, prefix in (("module.student.", "module.student."), ("network.", "network."),
                            ("_orig_mod.student.", "student.")):
        torch.save({f"{wrapper}{name}": value for name, value in vit.state_dict().items()}, tmp_path / "a.pt")
        assert load_backbone(TokenViT(**VIT), tmp_path / "a.pt", prefix)[1] == []
