"use strict";
// The parts of extras/ needed for generation (components.py, edges.py, basis.py), and reading the networks from a page.

/** components.py: tokens = latents / scale. */
class LatentScale {
  constructor(weights) { this.scale = weights["latent_map.scale"][0]; }
  inverse(latents) { return latents.map(x => x / this.scale); }
}

/** components.py: latents are principal components [M, k], scaled; tokens = latents / scale · directions + mean. */
class Components {
  constructor(weights) {
    [this.mean, this.directions, this.scale] = ["mean", "directions", "scale"].map(name => weights[`latent_map.${name}`]);
  }

  inverse(latents) {
    const tokens = this.mean.slice(), size = tokens.length;
    latents.forEach((x, i) => { for (let j = 0; j < size; j++) tokens[j] += x / this.scale[0] * this.directions[i * size + j]; });
    return tokens;
  }
}

/** edges.py: a decoder with replicate padding and, if `smooth`, a filter after each upsampling. */
function repeated(decoder, smooth) {
  return class extends decoder {
    static Conv = class extends decoder.Conv {
      convolve(x, kernel, size) {
        const y = super.convolve(x, kernel, size);
        return this.upsample && smooth ? blur(y, 2 * size) : y;
      }

      /** Replicate padding of x [size, size, ch] by `border`. */
      pad(x, size, border) {
        const ch = x.length / size / size, wide = size + 2 * border, y = super.pad(x, size, border);
        const inside = i => Math.min(Math.max(i, border), border + size - 1);
        if (border) for (let r = 0; r < wide; r++) for (let c = 0; c < wide; c++) {
          const from = (inside(r) * wide + inside(c)) * ch, to = (r * wide + c) * ch;
          if (from !== to) y.copyWithin(to, from, from + ch);
        }
        return y;
      }
    };
  };
}

/** Filters x [size, size, ch] with [1, 2, 1] / 4 along both axes, with replicate padding. */
function blur(x, size) {
  const ch = x.length / size / size;
  for (const [step, line] of [[ch, size * ch], [size * ch, ch]]) {
    const y = new Float32Array(x.length);
    for (let l = 0; l < size; l++) for (let k = 0, at = l * line; k < size; k++, at += step) {
      const before = k ? at - step : at, after = k < size - 1 ? at + step : at;
      for (let i = 0; i < ch; i++) y[at + i] = x[at + i] / 2 + (x[before + i] + x[after + i]) / 4;
    }
    x = y;
  }
  return x;
}

/** basis.py: frames = amplitude * NeRV + gain * (Σ_k factor_k(t) component_k + mean), with factors of the tokens' codes. */
class BasisDecoder {
  constructor(nerv, weights, name, count) {
    const c = this.config = nerv.config, of = part => weights[`${name}.${part}`];
    Object.assign(this, { nerv, count, gain: 0.6, amplitude: of("amplitude")[0], head: { weight: of("head.weight") } });
    [this.components, this.mean, this.strength] = ["components", "mean", "strength"].map(part => of(`basis.${part}`));
    this.per_token = this.head.weight.length / c.token_dim;
  }

  layers() { return this.nerv.layers(); }

  /** Tokens [N, d] -> a function of t. Codes, a linear map of the tokens, are the K * waves coefficients of cosine series. */
  forward(tokens, off = new Set()) {
    const frame = this.nerv.forward(tokens, off), { token_dim, num_frames, resolution } = this.config;
    const area = resolution ** 2, waves = this.strength.length;
    const codes = linear(tokens, this.head, token_dim).map((code, i) => off.has(Math.floor(i / this.per_token)) ? 0 : code);
    return t => {
      const wave = this.strength.map((strength, i) => strength * Math.cos((t + 0.5) * i * Math.PI / num_frames));
      const sum = this.mean.slice();
      for (let k = 0; k < this.count; k++) {
        const factor = wave.reduce((total, w, i) => total + w * codes[k * waves + i], 0), at = k * sum.length;
        for (let i = 0; i < sum.length; i++) sum[i] += factor * this.components[at + i];
      }
      return frame(t).map((v, i) => this.amplitude * v + this.gain * sum[i % 3 * area + Math.floor(i / 3)]); // [3, H, W] -> [H, W, 3]
    };
  }
}

// ---------------------------------------------------------------------------------------------------------- reading of a page

function bytes_of(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** Half precision, as 16-bit integers, to single: the factor converts the exponent bias. */
function from_half(half) {
  const bits = new Uint32Array(half.length), numbers = new Float32Array(bits.buffer);
  for (let i = 0; i < bits.length; i++) bits[i] = (half[i] & 0x8000) << 16 | (half[i] & 0x7fff) << 13;
  for (let i = 0; i < bits.length; i++) numbers[i] *= 2 ** 112;
  return numbers;
}

/** The networks: {dit, nerv, latent_map}. `weights` holds the entries of all tensors, concatenated. */
function load_dit({ dit_config, nerv_config, extras, tensors }, weights) {
  const named = {};
  let at = 0;
  for (const [name, size] of Object.entries(tensors)) named[name] = weights.subarray(at, at += size);
  const decoder = "edges" in extras || "filter" in extras ? repeated(NeRV, "filter" in extras) : NeRV;
  const nerv = new decoder(named, "basis" in extras ? "nerv.nerv" : "nerv", nerv_config);
  return {
    dit: new DiT(named, "dit", dit_config),
    nerv: "basis" in extras ? new BasisDecoder(nerv, named, "nerv", extras.basis) : nerv,
    latent_map: "components" in extras ? new Components(named) : new LatentScale(named),
  };
}
