"""The decoder once more, from its papers: float64 NumPy, one unpacked sequence, loops where they read better."""

import numpy as np


def hidden_states(config, params, tokens: np.ndarray) -> np.ndarray:
  """Hidden states [T, D] after the final norm, of one sequence of tokens [T]."""
  weights = _float64(params)
  x = weights["embed"][tokens]
  for layer in range(config.layers):
    p = {name: stacked[layer] for name, stacked in weights["layers"].items()}
    x = x + _attention(config, p, _rms_norm(x, p["attention_norm"], config.norm_eps))
    h = _rms_norm(x, p["mlp_norm"], config.norm_eps)
    gate = h @ p["gate"]
    x = x + (gate / (1 + np.exp(-gate)) * (h @ p["up"])) @ p["down"]
  return _rms_norm(x, weights["norm"], config.norm_eps)


def packed_hidden_states(config, params, batch) -> np.ndarray:
  """Hidden states [B, T, D] of a packed batch, segment by segment; zeros on padding."""
  out = np.zeros((*batch["tokens"].shape, config.embed))
  for row, ids in enumerate(batch["segment_ids"]):
    for segment in range(1, ids.max() + 1):
      place = ids == segment
      out[row, place] = hidden_states(config, params, batch["tokens"][row, place])
  return out


def log_softmax(logits: np.ndarray) -> np.ndarray:
  """Log-probabilities over the last axis, in nats."""
  shifted = logits - logits.max(axis=-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _attention(config, p, h):
  out = np.zeros_like(h)
  for head in range(config.heads):
    shared = head // (config.heads // config.kv_heads)  # the key/value head of this query head
    q = _rotate(h @ p["q"][:, head], config.rope_theta)
    k = _rotate(h @ p["k"][:, shared], config.rope_theta)
    scores = q @ k.T / np.sqrt(config.head_dim)
    scores[np.triu_indices(len(h), 1)] = -np.inf
    out += np.exp(log_softmax(scores)) @ (h @ p["v"][:, shared]) @ p["o"][head]
  return out


def _rotate(x, theta):
  """Rotates the pair (i, i + H/2) of x [T, H] by position * theta^(-2i/H): a complex product."""
  half = x.shape[1] // 2
  pairs = x[:, :half] + 1j * x[:, half:]
  frequencies = theta ** (-np.arange(half) / half)
  turned = pairs * np.exp(1j * np.arange(len(x))[:, None] * frequencies)
  return np.concatenate([turned.real, turned.imag], axis=1)


def _rms_norm(x, scale, eps):
  return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * scale


def _float64(tree):
  if isinstance(tree, dict):
    return {name: _float64(value) for name, value in tree.items()}
  return np.asarray(tree, np.float64)
