"""Vision, speech, diffusion models, embeddings, LoRA beside prompts: trained as unpatched."""

import copy

import pytest
import torch
from torch import nn

import lora_kernels as lk
from tests.stacks.models import (
    LINEARS,
    FusedCalls,
    assert_same_gradients,
    llama,
    lora_config,
    peft,
    randomize,
    tokens,
)

transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
STEPS = 4


def vit():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    image = {"image_size": 16, "patch_size": 4, "num_attention_heads": 4, "num_labels": 5}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, **image, initializer_range=0.2)
    )
    config = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["classifier"])
    images, labels = torch.randn(6, 3, 16, 16), torch.arange(6) % 5
    return peft.get_peft_model(model, config), lambda m: m(images, labels=labels).loss


def denoising(model, *inputs, **conditions):
    """Return a model and its loss: predict the noise."""
    noise = torch.randn_like(inputs[0])
    return model, lambda m: (m(*inputs, **conditions).sample[:, :4] - noise).square().mean()


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def unet(**config):
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    # diffusers' own way to PEFT's layers.
    model.add_adapter(peft.LoraConfig(**{"r": 4, "target_modules": ATTENTION, **config}))
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24)
    return denoising(model, latents, torch.tensor([3, 400]), text)


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=ATTENTION))
    model.eval()  # or labels are dropped at random
    labels = torch.tensor([1, 5])
    return denoising(model, torch.randn(2, 4, 8, 8), torch.tensor([3, 40]), class_labels=labels)


def whisper():
    """Not its convolutions: the encoder reads their stride, which PEFT's layer hasn't."""
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 60}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8, "init_std": 0.2}
    lengths = {"max_source_positions": 8, "max_target_positions": 16}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, **heads, **layers, **lengths, **ids)
    model = transformers.WhisperForConditionalGeneration(config)
    targets = ["q_proj", "v_proj", "fc1", "embed_tokens"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets))
    sounds, labels = torch.randn(2, 8, 16), torch.randint(3, 60, (2, 6))
    return model, lambda m: m(input_features=sounds, labels=labels).loss


def llama_with_embeddings():
    model = peft.get_peft_model(llama(), lora_config(target_modules=[*LINEARS, "embed_tokens"]))
    rows = tokens()
    return model, lambda m: m(input_ids=rows, labels=rows).loss


# What makes a model and its loss, the calls of a step that are fused, and what is left.
MODELS = {
    "ViT": (vit, 12, {}),
    "UNet": (unet, 40, {}),
    "UNet, convolutions too": (
        lambda: unet(target_modules=[*ATTENTION, "conv1", "conv2"]),
        56,
        set(),
    ),
    "DiT": (dit, 12, {}),
    "Whisper, embed_tokens too": (whisper, 9, {}),
    "Llama, embed_tokens too": (llama_with_embeddings, 2 * len(LINEARS) + 1, {}),
}


def train(model, loss_of):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(parameters, lr=0.05), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("name", MODELS)
def test_vision_and_diffusion_models(name):
    make, calls, left = MODELS[name]
    plain, loss_of = make()
    patched = copy.deepcopy(randomize(plain))
    assert set(lk.patch_peft(patched).left.values()) == set(left)
    expected = train(plain, loss_of)
    with FusedCalls() as fused:
        losses = train(patched, loss_of)
    assert fused.count == STEPS * calls
    assert expected[-1] < expected[0]
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    assert_same_gradients(patched, plain, 1e-3)


PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16
    ),
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_prompts_beside_adapters(kind):
    """LoRA in the layers, learned tokens in front, both trained."""
    base = peft.inject_adapter_in_model(lora_config(), llama())
    plain = peft.get_peft_model(base, PROMPTS[kind]())
    for name, parameter in randomize(plain).named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    patched, rows = copy.deepcopy(plain), tokens()
    assert len(lk.patch_peft(patched).patched) == 2 * len(LINEARS)

    def loss_of(model):
        return model(input_ids=rows, labels=rows).loss

    expected = train(plain, loss_of)
    with FusedCalls() as fused:
        losses = train(patched, loss_of)
    assert fused.count == STEPS * 2 * len(LINEARS)
    assert expected[-1] < expected[0]
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    assert_same_gradients(patched, plain, 1e-3)
    trained = [name for name, p in patched.named_parameters() if p.grad is not None]
    assert any("prompt" in name for name in trained)
