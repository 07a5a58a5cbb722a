"""Small models with the registration order and the fused weights of well-known ones, and what each weight is made of.

`parts` of a model says, literally, which matrices a weight holds: name -> (role, function from the weight to a list of
[d_out, d_in] matrices). Weights that are not named are vectors.
"""

import torch
from torch import nn
from torch.nn import functional as F

V, D, H, L = 17, 16, 4, 2


def attend(q, k, v):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def heads(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def rotated(x):
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / (1 + torch.arange(x.shape[-1] // 2))
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def whole(w):
    return [w]


class GptBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mix, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        q, k, v = (heads(part, H) for part in self.mix(self.ln_1(x)).split(D, -1))
        x = x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class GptLike(nn.Module):
    """nanoGPT: q, k, v one after the other, positions, tied head."""

    def __init__(self):
        super().__init__()
        body = {"wte": nn.Embedding(V, D), "wpe": nn.Embedding(8, D), "drop": nn.Dropout(0.1)}
        body |= {"h": nn.ModuleList(GptBlock() for _ in range(L)), "ln_f": nn.LayerNorm(D)}
        self.transformer = nn.ModuleDict(body)
        self.lm_head = nn.Linear(D, V, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids):
        t = self.transformer
        x = t.drop(t.wte(ids) + t.wpe(torch.arange(ids.shape[1])))
        for block in t.h:
            x = block(x)
        return self.lm_head(t.ln_f(x))

    def parts(self):
        made = {
            "transformer.wte.weight": ("head", whole),
            "transformer.wpe.weight": ("embedding", lambda w: [w.T]),
        }
        for i in range(L):
            made[f"transformer.h.{i}.mix.weight"] = ("hidden", lambda w: [w[:D], w[D : 2 * D], w[2 * D :]])
            for name in ("out", "up", "down"):
                made[f"transformer.h.{i}.{name}.weight"] = ("hidden", whole)
        return made


class ChatBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_q, self.c_k, self.c_v = (nn.Linear(D, n, bias=False) for n in (D, D // 2, D // 2))
        self.c_proj = nn.Linear(D, D, bias=False)
        self.c_fc, self.c_out = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)

    def forward(self, x, value):
        y = F.rms_norm(x, (D,))
        q, k = rotated(heads(self.c_q(y), H)), rotated(heads(self.c_k(y), H // 2))
        v = heads(self.c_v(y) + value, H // 2)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.c_out(F.relu(self.c_fc(F.rms_norm(x, (D,)))).square())


class ChatLike(nn.Module):
    """nanochat: the head before scalars and value embeddings, grouped queries, soft-capped logits."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(V, D), "h": nn.ModuleList(ChatBlock() for _ in range(L))})
        self.lm_head = nn.Linear(D, V, bias=False)
        self.resid_lambdas = nn.Parameter(torch.ones(L))
        self.value_embeds = nn.ModuleDict({"0": nn.Embedding(V, D // 2)})

    def forward(self, ids):
        x = F.rms_norm(self.transformer.wte(ids), (D,))
        for i, block in enumerate(self.transformer.h):
            x = block(self.resid_lambdas[i] * x, self.value_embeds["0"](ids))
        return 15 * torch.tanh(self.lm_head(F.rms_norm(x, (D,))).float().to(x.dtype) / 15)

    def parts(self):
        made = {"transformer.wte.weight": ("embedding", lambda w: [w.T]), "lm_head.weight": ("head", whole)}
        made["value_embeds.0.weight"] = ("embedding", lambda w: [w.T])
        for i in range(L):
            for name in ("c_q", "c_k", "c_v", "c_proj", "c_fc", "c_out"):
                made[f"transformer.h.{i}.{name}.weight"] = ("hidden", whole)
        return made


class LitBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(D), nn.RMSNorm(D)
        self.attn = nn.Linear(D, 8 * (D // H), bias=False)  # two groups of two queries, a key and a value
        self.proj = nn.Linear(D, D, bias=False)
        self.fc_1, self.fc_2 = nn.Linear(D, 24, bias=False), nn.Linear(D, 24, bias=False)
        self.down = nn.Linear(24, D, bias=False)

    def forward(self, x):
        groups = self.attn(self.norm_1(x)).unflatten(-1, (2, 4, D // H)).permute(0, 2, 3, 1, 4)
        q, k, v = groups.split((2, 1, 1), dim=2)
        q, k, v = (part.expand_as(q).reshape(x.shape[0], H, -1, D // H) for part in (q, k, v))
        x = x + self.proj(attend(rotated(q), rotated(k), v).transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.fc_1(self.norm_2(x))) * self.fc_2(self.norm_2(x)))


class LitLike(nn.Module):
    """litgpt: the head first, q, k and v of each group of heads beside one another."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(D, V, bias=False)
        body = {
            "wte": nn.Embedding(V, D),
            "h": nn.ModuleList(LitBlock() for _ in range(L)),
            "ln_f": nn.RMSNorm(D),
        }
        self.transformer = nn.ModuleDict(body)

    def forward(self, ids):
        x = self.transformer.wte(ids)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))

    def parts(self):
        def by_group(w):
            rows = w.unflatten(0, (2, 4, D // H))
            return [rows[:, :2].reshape(-1, D), rows[:, 2].reshape(-1, D), rows[:, 3].reshape(-1, D)]

        made = {"transformer.wte.weight": ("embedding", lambda w: [w.T]), "lm_head.weight": ("head", whole)}
        for i in range(L):
            made[f"transformer.h.{i}.attn.weight"] = ("hidden", by_group)
            for name in ("proj", "fc_1", "fc_2", "down"):
                made[f"transformer.h.{i}.{name}.weight"] = ("hidden", whole)
        return made


class DiTBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.fc1, self.fc2 = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, c):
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        y = F.layer_norm(x, (D,)) * (1 + scale) + shift
        q, k, v = self.qkv(y).unflatten(-1, (3, H, D // H)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + gate * self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        y = F.layer_norm(x, (D,)) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(F.gelu(self.fc1(y)))


class DiTLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, 12)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(F.layer_norm(x, (D,)) * (1 + scale) + shift)


class DiTLike(nn.Module):
    """DiT: patches, learned positions, the modulation of the last layer after its projection."""

    def __init__(self):
        super().__init__()
        self.x_embedder = nn.Conv2d(3, D, 2, stride=2)
        self.t_embedder = nn.Sequential(nn.Linear(8, D), nn.SiLU(), nn.Linear(D, D))
        self.y_embedder = nn.Embedding(5, D)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, D))
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(L))
        self.final_layer = DiTLast()

    def forward(self, x, t, y):
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        waves = torch.cat([torch.cos(t[:, None] * torch.arange(4)), torch.sin(t[:, None] * torch.arange(4))], -1)
        c = self.t_embedder(waves.to(x.dtype)) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).unflatten(1, (4, 4)).unflatten(-1, (2, 2, 3))
        return torch.einsum("nhwpqc->nchpwq", x).flatten(4).flatten(2, 3)

    def parts(self):
        def shifts(count):
            return lambda w: list(w.chunk(count))

        made = {
            "x_embedder.weight": ("conv", lambda w: [w.flatten(1)]),
            "t_embedder.0.weight": ("hidden", whole),
            "t_embedder.2.weight": ("hidden", whole),
            "y_embedder.weight": ("embedding", lambda w: [w.T]),
            "pos_embed": ("embedding", lambda w: [w[0].T]),
            "final_layer.linear.weight": ("head", whole),
            "final_layer.adaLN_modulation.1.weight": ("hidden", shifts(2)),
        }
        for i in range(L):
            made[f"blocks.{i}.qkv.weight"] = ("hidden", shifts(3))
            made[f"blocks.{i}.adaLN_modulation.1.weight"] = ("hidden", shifts(6))
            for name in ("proj", "fc1", "fc2"):
                made[f"blocks.{i}.{name}.weight"] = ("hidden", whole)
        return made


class WordLike(nn.Transformer):
    """torch's word language model: a Transformer whose decoder, registered early, became the head."""

    def __init__(self):
        super().__init__(D, H, num_encoder_layers=L, num_decoder_layers=1, dim_feedforward=24)
        self.input_emb = nn.Embedding(V, D)
        self.decoder = nn.Linear(D, V)

    def forward(self, ids):
        return F.log_softmax(self.decoder(self.encoder(self.input_emb(ids.T) * D**0.5)), -1)

    def parts(self):
        made = {"input_emb.weight": ("embedding", lambda w: [w.T]), "decoder.weight": ("head", whole)}
        for i in range(L):
            made[f"encoder.layers.{i}.self_attn.in_proj_weight"] = ("hidden", lambda w: list(w.chunk(3)))
            for name in ("self_attn.out_proj", "linear1", "linear2"):
                made[f"encoder.layers.{i}.{name}.weight"] = ("hidden", whole)
        return made


def tokens():
    return torch.randint(0, V, (2, 6), generator=torch.Generator().manual_seed(0))


def images():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 3, 8, 8, generator=generator).double(),
        torch.rand(2, generator=generator),
        torch.tensor([1, 3]),
    )


MODELS = {
    "gpt": (GptLike, tokens),
    "chat": (ChatLike, tokens),
    "lit": (LitLike, tokens),
    "dit": (DiTLike, images),
    "word": (WordLike, tokens),
}
