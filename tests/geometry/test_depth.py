"""How far parameters are from the outputs: what a reader of each model would count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerwise.errors import LayerwiseError
from layerwise.geometry.depth import distances

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = {"image_size": 32, "patch_size": 8}


def begins(found: Mapping[str, int], prefix: str) -> set[int]:
    """The distances of all parameters whose names begin so."""
    values = {distance for name, distance in found.items() if name.startswith(prefix)}
    assert values, prefix
    return values


def holds(found: Mapping[str, int], expected: Mapping[str, int]) -> None:
    """All parameters under each prefix have that distance."""
    assert {prefix: begins(found, prefix) for prefix in expected} == {prefix: {n} for prefix, n in expected.items()}


def test_a_gpt2():
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, **WORDS))
    blocks = {f"transformer.h.{i}.": 3 - i for i in range(3)}
    holds(distances(model), {"transformer.ln_f": 0, **blocks, "transformer.wte": 4, "transformer.wpe": 4})


def test_a_bert_with_a_new_head():
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **WORDS))
    blocks = {f"bert.encoder.layer.{i}.": 3 - i for i in range(3)}
    holds(distances(model), {"classifier": 0, "bert.pooler": 0, **blocks, "bert.embeddings": 4})


def test_stages_are_taken_apart_and_what_lies_between_them_goes_with_the_stage_before():
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    found = distances(transformers.SwinForImageClassification(config))
    blocks = {f"swin.encoder.layers.{s}.blocks.{b}.": 4 - 2 * s - b for s in range(2) for b in range(2)}
    holds(found, {"classifier": 0, **blocks, "swin.encoder.layers.0.downsample": 3, "swin.embeddings": 5})


def test_a_resnet_of_stages_of_one_block_and_of_two():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16], depths=[1, 2, 1])
    found = distances(transformers.ResNetForImageClassification(config))
    stages = {(0, 0): 4, (1, 0): 3, (1, 1): 2, (2, 0): 1}
    blocks = {f"resnet.encoder.stages.{s}.layers.{b}.": n for (s, b), n in stages.items()}
    holds(found, {"classifier": 0, **blocks, "resnet.embedder": 5})


def test_towers_side_by_side_have_a_top_each():
    text, vision = {**SMALL, **WORDS, "num_hidden_layers": 2}, {**SMALL, **IMAGE}
    found = distances(
        transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    )
    blocks = {f"text_model.encoder.layers.{i}.": 2 - i for i in range(2)}
    blocks |= {f"vision_model.encoder.layers.{i}.": 3 - i for i in range(3)}
    holds(found, {"logit_scale": 0, "text_projection": 0, **blocks, "text_model.embeddings": 3, "vision_model.emb": 4})


def test_a_decoder_does_not_come_after_the_encoder_beside_it():
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=3, num_heads=4, vocab_size=99, decoder_start_token_id=0
    )
    blocks = {f"encoder.block.{i}.": 2 - i for i in range(2)} | {f"decoder.block.{i}.": 3 - i for i in range(3)}
    tops = {"encoder.final_layer_norm": 0, "decoder.final_layer_norm": 0}
    holds(distances(transformers.T5ForConditionalGeneration(config)), {**tops, **blocks, "shared": 4})


def test_a_block_that_runs_several_times_is_one():
    found = distances(transformers.AlbertModel(transformers.AlbertConfig(**SMALL, embedding_size=16, **WORDS)))
    holds(found, {"pooler": 0, "encoder.albert_layer_groups": 1, "embeddings": 2, "encoder.embedding_hidden": 2})


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return x + sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class Layers(nn.Module):
    """Blocks in a dict of modules, as torchtitan has them, with experts side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.out = nn.Linear(4, 8), nn.Linear(8, 2)
        self.layers = nn.ModuleDict({str(i): Experts() for i in range(3)})

    def forward(self, x: Tensor) -> Any:
        x = self.inputs(x)
        for layer in self.layers.values():
            x = layer(x)
        return self.out(x)


def test_experts_side_by_side_are_one_block():
    found = distances(Layers(), torch.randn(3, 4))
    holds(found, {"out": 0, **{f"layers.{i}.": 3 - i for i in range(3)}, "inputs": 4})


def test_layers_without_a_list_and_in_one_are_counted_one_by_one():
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    holds(distances(plain, torch.randn(3, 4)), {"4": 0, "3": 1, "2": 1, "0": 2})


class Written(nn.Module):
    """Positions, and blocks that write in place; a tensor that is freed leaves its place to another."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(5, 8))
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(Residual() for _ in range(2))
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        stream = torch.empty(len(x), 5, 8)
        stream[:] = self.embed(x)
        stream += self.positions
        for block in self.blocks:
            block(stream)
        return self.head(stream.mean(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> None:
        x += self.down(self.up(x).relu())


def test_what_is_written_in_place_counts():
    with pytest.warns(UserWarning, match="^unused.weight, unused.bias took no part"):
        found = distances(Written(), torch.randn(3, 5, 4))
    holds(found, {"head": 0, "unused": 0, "blocks.1.": 1, "blocks.0.": 2, "positions": 3, "embed": 3})


def test_the_last_block_is_one_away_from_a_head_that_is_tied():
    model = transformers.BartForCausalLM(transformers.BartConfig(d_model=32, decoder_layers=2, decoder_ffn_dim=64, **WORDS))
    holds(distances(model), {"model.decoder.layers.1.": 1, "model.decoder.layers.0.": 2, "model.decoder.embed_tokens": 3})


class Stack(nn.Module):
    """Blocks of an `Inner` each, given their inputs by a function of the stream, a mask and an embedding of time."""

    def __init__(self, give: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor], head: nn.Module | None = None) -> None:
        super().__init__()
        self.give = give
        self.embed, self.time = nn.Linear(4, 8), nn.Linear(1, 8)
        self.blocks = nn.ModuleList(Inner() for _ in range(3))
        self.head = head or nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        mask, time, x = torch.ones(len(x), len(x)), self.time(x[:, :1]), self.embed(x)
        for block in self.blocks:
            x = self.give(block, x, mask, time)
        return self.head(x)


@dataclass
class State:
    """A user's own record."""

    mask: Tensor
    x: Tensor


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, *given: Any, **named: Tensor) -> Tensor:
        *others, x = vars(given[0]).values() if isinstance(given[0] if given else None, State) else (*given, *named.values())
        return x + self.down(self.up(x).relu()) + sum(other.mean() for other in others)

    def run(self, x: Tensor) -> Tensor:
        return Inner.forward(self, x)


@pytest.mark.parametrize(
    "give",
    [
        lambda block, x, mask, time: block(mask, x),  # as of graphs
        lambda block, x, mask, time: block(mask=mask, x=x),
        lambda block, x, mask, time: block(time, x),
        lambda block, x, mask, time: block.forward(x),
        lambda block, x, mask, time: block(State(mask, x)),
        lambda block, x, mask, time: checkpoint(block, x, use_reentrant=True),
    ],
)
def test_the_stream_is_found_among_a_blocks_inputs(give):
    found = distances(Stack(give), torch.randn(3, 4))
    holds(found, {"head": 0, **{f"blocks.{i}.": 3 - i for i in range(3)}, "embed": 4})


class Skips(nn.Module):
    """A U-Net whose later blocks are given what they skip first, and a block each of whose layers takes all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.out = nn.Linear(4, 8), nn.Linear(8, 2)
        self.down, self.up = (nn.ModuleList(Inner() for _ in range(2)) for _ in range(2))
        self.middle = nn.Linear(8, 8)
        self.dense = nn.ModuleList(Inner() for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        x, skipped = self.inputs(x), []
        for block in self.down:
            x = block(x)
            skipped.append(x)
        x = self.middle(x)
        for block in self.up:
            x = block(skipped.pop(), x)
        earlier = [x]
        for block in self.dense:
            earlier.append(block(*earlier))
        return self.out(earlier[-1])


def test_what_skips_blocks_is_not_the_stream():
    dense, up, down = ({f"{n}.{i}.": at - i for i in range(size)} for n, at, size in STACKS)
    holds(distances(Skips(), torch.randn(3, 4)), {"out": 0, **dense, **up, "middle": 6, **down, "inputs": 8})


STACKS = (("dense", 3, 3), ("up", 5, 2), ("down", 7, 2))


class Stage(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.down, self.blocks = nn.Linear(8, 8), nn.Sequential(*(Inner() for _ in range(blocks)))

    def forward(self, x: Tensor) -> Any:
        return self.blocks(self.down(x))


def test_a_stage_of_one_block_is_a_stage_as_the_others_are():
    model = nn.Sequential(nn.Linear(4, 8), Stage(1), Stage(2), nn.Linear(8, 2))
    stages = {"1.down": 4, "1.blocks.0.": 3, "2.down": 3, "2.blocks.0.": 2, "2.blocks.1.": 1}
    holds(distances(model, torch.randn(3, 4)), {"3": 0, **stages, "0": 4})


def test_blocks_that_run_by_a_method_of_their_own_are_refused():
    with pytest.raises(LayerwiseError, match=r"blocks.0, blocks.1, blocks.2 ran by another method .* block\(x\)"):
        distances(Stack(lambda block, x, *_: block.run(x)), torch.randn(3, 4))
    traced = torch.jit.trace(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(3, 4))
    with pytest.raises(LayerwiseError, match=r"0, 1 ran by another method than forward, or inside of a scripted model"):
        distances(traced, torch.randn(3, 4))


class Perceptron(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, classes))

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


class Tasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"a": Perceptron(2), "b": Perceptron(3)})

    def forward(self, x: Tensor) -> Any:
        return {name: head(x) for name, head in self.heads.items()}


@pytest.mark.parametrize("head", [Tasks(), nn.Sequential(Perceptron(2))])
def test_heads_with_layers_of_their_own_are_heads(head):
    found = distances(Stack(lambda block, x, mask, time: block(time, x), head), torch.randn(3, 4))
    holds(found, {"head": 0, **{f"blocks.{i}.": 3 - i for i in range(3)}, "embed": 4})


class Plain(nn.Module):
    """Layers without a list, with a scale after the head, attention whose last matrix is not called, and a spare layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend, self.head = nn.Linear(4, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 2)
        self.scale, self.spare = nn.Parameter(torch.ones(())), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        return self.scale * self.head(self.attend(x, x, x)[0])


def test_the_head_is_a_head_whatever_else_there_is():
    with pytest.warns(UserWarning, match="^spare took no part"):
        holds(distances(Plain(), torch.randn(3, 4)), {"head": 0, "scale": 0, "spare": 0, "attend.": 1, "embed": 2})


def test_parameters_outside_of_blocks_that_took_no_part_are_told():
    model = Stack(lambda block, x, *_: block(x))
    model.mask_token, model.frozen = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8), requires_grad=False)
    with pytest.warns(UserWarning, match="^mask_token took no part"):
        holds(distances(model, torch.randn(3, 4)), {"blocks.2.": 1, "mask_token": 0, "frozen": 0})


class ForceField(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Any:
        x = x.requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def test_a_model_that_differentiates_by_its_inputs():
    holds(distances(ForceField(), torch.randn(4, 3)), {"energy.2": 0, "energy.0": 1})


def test_adapters_of_peft_need_no_batch():
    peft = pytest.importorskip("peft")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, **WORDS))
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    found = distances(peft.get_peft_model(model, config))
    assert [n for name, n in found.items() if "lora_B" in name] == [3, 2, 1]


class Towers(nn.Module):
    """The second tower runs where it is given something."""

    def __init__(self) -> None:
        super().__init__()
        self.texts, self.images = Layers(), Layers()

    def forward(self, texts: Tensor, images: Tensor | None = None) -> Any:
        return self.texts(texts) if images is None else self.texts(texts) + self.images(images)


def test_blocks_that_did_not_run_are_told():
    model, batch = Towers(), torch.randn(3, 4)
    with pytest.warns(UserWarning, match="images.layers.0, images.layers.1, images.layers.2 and 4 more took no part"):
        assert begins(distances(model, batch), "images.") == {0}
    found = distances(model, (batch, batch))
    assert all(found[name] == found[name.replace("images", "texts")] for name in found)


class Normed(nn.Linear):
    """Writes into its weight whenever it runs."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.div_(self.weight.norm())
        return super().forward(x)


def test_nothing_of_the_model_changes():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), Normed(8, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    drawn = torch.get_rng_state()
    distances(model, torch.randn(3, 4, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("batch", "told"), [(None, "give batch="), (torch.randn(3, 5), "did not run on the batch .RuntimeError: mat1 and mat2")]
)
def test_a_model_that_cannot_be_run_is_told(batch, told):
    with pytest.raises(LayerwiseError, match=told):
        distances(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), batch)
