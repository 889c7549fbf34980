"use strict";
// The generator in plain JavaScript: dit.py turns noise into weight tokens, nerv.py turns tokens and a time into a frame.
// Names and order follow the Python files; extras.js corresponds to extras/. There is one video at a time, so shapes lack
// Python's B. Tensors are Float32Arrays with the last dimension contiguous; feature maps are [height, width, channels].

// ------------------------------------------------------------------------------------------------------- the matrix product

/** c[m, n] += Σ_k a[m, k] b[n, k]; a0, b0, c0 are offsets of the first rows, lda, ldb, ldc the distances between rows. */
function product(a, b, c, M, N, K, a0, lda, b0, ldb, c0, ldc) {
  for (let m = 0; m < M; m++) for (let n = 0; n < N; n++) {
    let sum = 0;
    for (let k = 0, i = a0 + m * lda, j = b0 + n * ldb; k < K; k++) sum += a[i + k] * b[j + k];
    c[c0 + m * ldc + n] += sum;
  }
}

/** Calls run(multiply), where multiply(M, N, K, a0, lda, b0, ldb, c0, ldc) adds a product of parts of a and b to c. */
let products = (a, b, c, run) => {
  run((...sizes) => product(a, b, c, ...sizes));
  return c;
};

/** Switches to the matrix product of gemm.wasm, 128 bits at a time. Returns the weights, moved to its memory. */
function use_simd(bytes, weights, scratch) {
  const memory = new WebAssembly.Memory({ initial: Math.ceil(4 * (weights.length + scratch) / 65536) + 1 });
  const all = new Float32Array(memory.buffer);
  const simd = new WebAssembly.Instance(new WebAssembly.Module(bytes), { page: { memory } }).exports.product, plain = products;
  all.set(weights);
  products = (a, b, c, run) => {
    let top = weights.length;
    const place = x => { // the index of x in the memory, copied there if necessary
      if (x.buffer === memory.buffer) return x.byteOffset / 4;
      const at = top;
      top += x.length;
      if (top <= all.length) all.set(x, at);
      return at;
    };
    const [pa, pb, pc] = [a, b, c].map(place);
    if (top > all.length) return plain(a, b, c, run);
    run((M, N, K, a0, lda, b0, ldb, c0, ldc) => K % 4 ? product(all, all, all, M, N, K, pa + a0, lda, pb + b0, ldb, pc + c0, ldc)
      : simd(M, N, K, 4 * (pa + a0), 4 * lda, 4 * (pb + b0), 4 * ldb, 4 * (pc + c0), 4 * ldc));
    c.set(all.subarray(pc, pc + c.length));
    return c;
  };
  return all.subarray(0, weights.length);
}

/** torch.nn.Linear: x [rows, in], weight [out, in], bias [out] or none -> [rows, out]. */
function linear(x, { weight, bias }, width) {
  const rows = x.length / width, out = weight.length / width, y = new Float32Array(rows * out);
  if (bias) for (let r = 0; r < rows; r++) y.set(bias, r * out);
  return products(x, weight, y, multiply => multiply(rows, out, width, 0, width, 0, width, 0, out));
}

// ------------------------------------------------------------------------------------------------------ nerv.py, the decoder

/** Sine and cosine features of a real position, in cells or frames: [dim]. Frequencies are evenly spaced. */
function sinusoid(position, dim, length) {
  const count = dim / 2, lowest = Math.PI / 2 / length, highest = Math.min((count - 0.5) * Math.PI / length, 0.9 * Math.PI);
  const angle = Array.from({ length: count }, (_, i) => position * (lowest + (highest - lowest) * i / Math.max(1, count - 1)));
  return [...angle.map(Math.sin), ...angle.map(Math.cos)].map(x => Math.SQRT2 * x);
}

/** The only input of the network, for a frame position t: features of time, height and width, [h, w, 3 * pos_dim]. */
function position_code(t, { pos_size, pos_dim, num_frames }) {
  const time = sinusoid(t, pos_dim, num_frames), cell = Array.from({ length: pos_size }, (_, i) => sinusoid(i, pos_dim, pos_size));
  const x = new Float32Array(pos_size * pos_size * 3 * pos_dim);
  let at = 0;
  for (const height of cell) for (const width of cell) for (const code of [time, height, width]) {
    x.set(code, at);
    at += pos_dim;
  }
  return x;
}

/** A convolution with a partly shared kernel; W[:block_out, :block_in] is generated from the tokens. */
class ModulatedConv {
  constructor(weights, name, config, in_ch, out_ch, kernel_size, block_in, block_out, upsample = false, gain = 1) {
    Object.assign(this, { name, in_ch, out_ch, k: kernel_size, block_in, block_out, upsample, gain, width: config.token_dim });
    for (const part of ["offset", "beside", "below", "bias"]) this[part] = weights[`${name}.${part}`];
    this.head = { weight: weights[`${name}.head.weight`] };
    this.per_token = this.head.weight.length / this.width;
  }

  /** Entries of the block, per_token from each token in turn: head(tokens) + offset, or 0 for tokens with index in `off`. */
  generate(tokens, off) {
    const made = linear(tokens, this.head, this.width);
    return this.offset.map((offset, i) => off.has(Math.floor(i / this.per_token)) ? 0 : made[i] + offset);
  }

  /** The kernel before demodulation, affine in the tokens: [out, in, k, k]. */
  weight(tokens, off) {
    const { in_ch, out_ch, block_in, block_out, beside, below } = this, taps = this.k * this.k;
    const block = this.generate(tokens, off), W = new Float32Array(out_ch * in_ch * taps);
    const rest = (in_ch - block_in) * taps;
    for (let o = 0; o < block_out; o++) {
      for (let i = 0; i < block_in; i++)
        for (let tap = 0; tap < taps; tap++)
          W[(o * in_ch + i) * taps + tap] = block[this.upsample ? (i * taps + tap) * block_out + o : (o * taps + tap) * block_in + i];
      W.set(beside.subarray(o * rest, (o + 1) * rest), (o * in_ch + block_in) * taps);
    }
    W.set(below, block_out * in_ch * taps);
    return W;
  }

  /** Demodulation: W[o] <- gain * W[o] / √(Σ W[o]² + 1e-8), so that outputs have the variance of the inputs. */
  kernel(tokens, off) {
    const W = this.weight(tokens, off), each = W.length / this.out_ch;
    for (let o = 0; o < this.out_ch; o++) {
      const row = W.subarray(o * each, (o + 1) * each), norm = this.gain / Math.sqrt(row.reduce((sum, w) => sum + w * w, 1e-8));
      for (let i = 0; i < each; i++) row[i] *= norm;
    }
    return W;
  }

  /** Tokens [N, d] -> this video's convolution, a function of a feature map [size, size, in] and its size. */
  forward(tokens, off) {
    const kernel = this.arrange(this.kernel(tokens, off));
    return (x, size) => this.convolve(x, kernel, size);
  }

  /** A kernel [out, in, k, k] with input channels last, for `convolve`: [out, k, k, in], or [2, 2, out, 2, 2, in].
   *
   * Output pixel (2r + a, 2c + b) of a transposed convolution depends on input pixels (r + a - 1 + i, c + b - 1 + j), for i and
   * j of 0 and 1, through taps (3 - a - 2i, 3 - b - 2j): four convolutions with 2 x 2 kernels, one for each (a, b). */
  arrange(kernel) {
    const { k, in_ch, out_ch, upsample } = this, y = new Float32Array(kernel.length);
    const bits = upsample ? [0, 1] : [0], side = upsample ? 2 : k;
    let at = 0;
    for (const a of bits) for (const b of bits) for (let o = 0; o < out_ch; o++)
      for (let i = 0; i < side; i++) for (let j = 0; j < side; j++) {
        const tap = upsample ? (3 - a - 2 * i) * k + 3 - b - 2 * j : i * k + j;
        for (let n = 0; n < in_ch; n++) y[at++] = kernel[(o * in_ch + n) * k * k + tap];
      }
    return y;
  }

  /** x [size, size, in] -> [size, size, out], or twice the size if upsampling: a product per row of map and kernel. */
  convolve(x, kernel, size) {
    const { in_ch: I, out_ch: O, k, upsample } = this, border = upsample ? 1 : k >> 1, wide = size + 2 * border;
    const y = new Float32Array((upsample ? 4 : 1) * size * size * O);
    for (let i = 0; i < y.length; i += O) y.set(this.bias, i);
    return products(this.pad(x, size, border), kernel, y, multiply => {
      if (!upsample)
        for (let r = 0; r < size; r++) for (let i = 0; i < k; i++)
          multiply(size, O, k * I, (r + i) * wide * I, I, i * k * I, k * k * I, r * size * O, O);
      else
        for (let a = 0; a < 2; a++) for (let b = 0; b < 2; b++) for (let r = 0; r < size; r++) for (let i = 0; i < 2; i++) {
          const x0 = ((r + a + i) * wide + b) * I, kernel0 = ((2 * a + b) * O * 4 + 2 * i) * I, y0 = ((2 * r + a) * 2 * size + b) * O;
          multiply(size, O, 2 * I, x0, I, kernel0, 4 * I, y0, 2 * O);
        }
    });
  }

  /** x [size, size, ch] with a border of zeros. */
  pad(x, size, border) {
    if (!border) return x;
    const ch = x.length / size / size, wide = size + 2 * border, y = new Float32Array(wide * wide * ch);
    for (let r = 0; r < size; r++) y.set(x.subarray(r * size * ch, (r + 1) * size * ch), ((r + border) * wide + border) * ch);
    return y;
  }
}

/** Bilinear upsampling, half-pixel centres: ¾ of a pixel + ¼ of its neighbour, [size, size, ch] -> [2 size, 2 size, ch]. */
function double(x, size) {
  const ch = x.length / size / size, row = 2 * size * ch;
  const wide = new Float32Array(2 * x.length), y = new Float32Array(4 * x.length);
  const neighbour = i => Math.min(Math.max((i >> 1) + (i % 2 ? 1 : -1), 0), size - 1);
  for (let r = 0; r < size; r++) for (let c = 0; c < 2 * size; c++) {
    const near = (r * size + (c >> 1)) * ch, far = (r * size + neighbour(c)) * ch, to = r * row + c * ch;
    for (let i = 0; i < ch; i++) wide[to + i] = 0.75 * x[near + i] + 0.25 * x[far + i];
  }
  for (let r = 0; r < 2 * size; r++) {
    const near = (r >> 1) * row, far = neighbour(r) * row;
    for (let i = 0; i < row; i++) y[r * row + i] = 0.75 * wide[near + i] + 0.25 * wide[far + i];
  }
  return y;
}

const GELU_GAIN = 1.5336;

const GELU_TABLE = Float32Array.from({ length: 16385 }, (_, i) => { // x Φ(x) at -8 … 8, in steps of 1 / 1024
  const x = i / 1024 - 8, z = Math.abs(x) / Math.SQRT2, u = 1 / (1 + z / 2); // erfc after Numerical Recipes, to 1.2e-7
  const series = [0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368];
  const erfc = u * Math.exp([...series, -1.26551223].reduce((sum, coefficient) => sum * u + coefficient) - z * z);
  return x * (x > 0 ? 1 - erfc / 2 : erfc / 2);
});

/** GELU(x) = x Φ(x), in place; linear between the entries of the table. */
function gelu(x) {
  for (let i = 0; i < x.length; i++) {
    const v = x[i], at = (v + 8) * 1024, k = at | 0;
    x[i] = v >= 8 ? v : v > -8 ? GELU_TABLE[k] + (at - k) * (GELU_TABLE[k + 1] - GELU_TABLE[k]) : 0;
  }
  return x;
}

/** One x2 level: a transposed convolution, one or two 3x3 convolutions, and a residual side connection. */
class Block {
  constructor(up, convs, side = null) { Object.assign(this, { up, convs, side }); }

  /** Tokens -> a function of a feature map [size, size, ch] and its size: (double(side(x)) + GELU_GAIN * h) / √2. */
  forward(tokens, off) {
    const [up, side, ...convs] = [this.up, this.side, ...this.convs].map(conv => conv && conv.forward(tokens, off));
    return (x, size) => {
      let h = gelu(up(x, size));
      for (const conv of convs) h = gelu(conv(h, 2 * size));
      const y = double(side ? side(x, size) : x, size);
      for (let i = 0; i < y.length; i++) y[i] = (y[i] + GELU_GAIN * h[i]) * Math.SQRT1_2;
      return y;
    };
  }
}

/** The decoder: maps weight tokens of a video to a function that returns its frame at a time. */
class NeRV {
  static Conv = ModulatedConv; // subclasses may replace it, as in extras.js
  static Level = Block;

  constructor(weights, name, config) {
    const { Conv, Level } = this.constructor, c = this.config = config;
    const D = c.width, last = c.last_factor * D, f = c.stem_fraction, m = Math.min(c.block, D, last), pos = 3 * c.pos_dim;
    const conv = (at, in_ch, out_ch, k = 3, gain = GELU_GAIN, upsample = false) =>
      new Conv(weights, `${name}.${at}`, c, in_ch, out_ch, k, m, Math.floor(m * out_ch / in_ch), upsample, gain);
    const up = (at, ch) => conv(`${at}.up`, ch, ch, 4, 2, true);
    const levels = Math.log2(c.resolution / c.pos_size);
    this.stem = new Conv(weights, `${name}.stem`, c, pos, D, 3, Math.floor(pos / f), Math.floor(D / f));
    this.blocks = Array.from({ length: levels }, (_, i) => {
      const at = `blocks.${i}`, ch = i === levels - 2 ? last : D; // the last but one changes the width from D to `last`
      if (i === levels - 1) return new Level(up(at, last), [conv(`${at}.convs.0`, last, last)]);
      const side = ch !== D ? conv(`${at}.side`, D, ch, 1, 1) : null;
      return new Level(up(at, D), [conv(`${at}.convs.0`, D, D), conv(`${at}.convs.1`, D, ch)], side);
    });
    this.to_rgb = new Conv(weights, `${name}.to_rgb`, c, last, 3, 3, Math.max(1, last >> 1), 3);
  }

  /** All layers in order, side connections included. */
  layers() {
    return [this.stem, ...this.blocks.flatMap(block => [block.up, ...block.convs, block.side]), this.to_rgb].filter(Boolean);
  }

  /** Tokens [N, d] -> a function of the frame position t, a real number, that returns [H, W, 3] in [-1, 1]. */
  forward(tokens, off = new Set()) {
    const [stem, to_rgb, ...blocks] = [this.stem, this.to_rgb, ...this.blocks].map(part => part.forward(tokens, off));
    return t => {
      let size = this.config.pos_size, x = gelu(stem(position_code(t, this.config), size));
      for (let i = 0; i < x.length; i++) x[i] *= GELU_GAIN;
      for (const block of blocks) {
        x = block(x, size);
        size *= 2;
      }
      return to_rgb(x, size).map(Math.tanh);
    };
  }
}

// ------------------------------------------------------------------------------------------------------- dit.py, the denoiser

/** norm(x) (1 + scale) + shift, with layer norm of each row of x [rows, width]; shift, scale: columns of condition [B, …]. */
function modulate(x, width, condition, shift, scale) {
  const y = new Float32Array(x.length), { columns, tokens, values } = condition;
  for (let r = 0; r * width < x.length; r++) {
    const row = x.subarray(r * width, (r + 1) * width), at = Math.floor(r / tokens) * columns;
    const mean = row.reduce((sum, v) => sum + v, 0) / width, variance = row.reduce((sum, v) => sum + (v - mean) ** 2, 0) / width;
    for (let i = 0, norm = 1 / Math.sqrt(variance + 1e-6); i < width; i++)
      y[r * width + i] = (row[i] - mean) * norm * (1 + values[at + scale * width + i]) + values[at + shift * width + i];
  }
  return y;
}

/** x + gate * h, in place; gate is a column of condition [B, …]. */
function gated(x, h, width, { columns, tokens, values }, gate) {
  for (let r = 0; r * width < x.length; r++) {
    const at = Math.floor(r / tokens) * columns + gate * width;
    for (let i = 0; i < width; i++) x[r * width + i] += values[at + i] * h[r * width + i];
  }
  return x;
}

const silu = x => x.map(v => v / (1 + Math.exp(-v)));
const gelu_tanh = x => x.map(v => v / (1 + Math.exp(-Math.sqrt(8 / Math.PI) * (v + 0.044715 * v * v * v)))); // v / 2 (1 + tanh …)

/** Self-attention in sequences of N: q, k, v of all heads, concatenated [B * N, 3 * width] -> softmax(q kᵀ / √size) v. */
function attention(qkv, N, width, heads) {
  const y = new Float32Array(qkv.length / 3), size = width / heads, p = new Float64Array(N), row = 3 * width;
  for (let b = 0; b * N * row < qkv.length; b++) for (let h = 0; h < heads; h++) for (let n = 0; n < N; n++) {
    const first = b * N * row + h * size, q = first + n * row, k = first + width, v = k + width, to = (b * N + n) * width + h * size;
    let most = -Infinity, sum = 0;
    for (let m = 0; m < N; m++) {
      let s = 0;
      for (let i = 0; i < size; i++) s += qkv[q + i] * qkv[k + m * row + i];
      most = Math.max(most, p[m] = s / Math.sqrt(size));
    }
    for (let m = 0; m < N; m++) sum += p[m] = Math.exp(p[m] - most);
    for (let m = 0; m < N; m++) for (let i = 0; i < size; i++) y[to + i] += p[m] / sum * qkv[v + m * row + i];
  }
  return y;
}

/** The denoiser: noisy latents [B * N, d], a timestep of 1 … 1000 and B labels (num_classes: no class) -> ε [B * N, d]. */
class DiT {
  constructor(weights, name, config) {
    this.config = config;
    this.layer = at => ({ weight: weights[`${name}.${at}.weight`], bias: weights[`${name}.${at}.bias`] });
    this.position = weights[`${name}.position`];
  }

  forward(latents, timestep, labels) {
    const { num_tokens: N, token_dim, width, depth, heads } = this.config, layer = this.layer;
    const code = this.step_code(timestep), embedding = layer("label").weight, condition = new Float32Array(labels.length * width);
    labels.forEach((label, b) => condition.set(code.map((v, i) => v + embedding[label * width + i]), b * width));
    // Shifts, scales and gates of adaLN-zero: `columns` numbers for each of the B conditions.
    const adaln = (at, parts) => ({ columns: parts * width, tokens: N, values: linear(silu(condition), layer(at), width) });
    let x = linear(latents, layer("embed"), token_dim).map((v, i) => v + this.position[i % (N * width)]);
    for (let i = 0; i < depth; i++) {
      const at = `blocks.${i}`, c = adaln(`${at}.adaln.1`, 6);
      const qkv = linear(modulate(x, width, c, 0, 1), layer(`${at}.attention.qkv`), width);
      x = gated(x, linear(attention(qkv, N, width, heads), layer(`${at}.attention.out`), width), width, c, 2);
      const hidden = gelu_tanh(linear(modulate(x, width, c, 3, 4), layer(`${at}.mlp.0`), width));
      x = gated(x, linear(hidden, layer(`${at}.mlp.2`), 4 * width), width, c, 5);
    }
    return linear(modulate(x, width, adaln("adaln.1", 2), 0, 1), layer("out"), width);
  }

  /** An MLP of cosines and sines of the timestep at 128 frequencies of 1 … 1 / 10000: [width]. In float32, as in Python. */
  step_code(timestep) {
    const angle = Array.from({ length: 128 }, (_, i) => Math.fround(timestep * Math.fround(Math.exp(-Math.log(10000) * i / 128))));
    const code = Float32Array.from([...angle.map(Math.cos), ...angle.map(Math.sin)]);
    return linear(silu(linear(code, this.layer("step_mlp.0"), 256)), this.layer("step_mlp.2"), this.config.width);
  }
}

const NUM_STEPS = 1000;

/** α_τ, σ_τ [1001] of the variance-preserving process with β from 1e-4 to 2e-2; index 0 is clean. */
function noise_schedule() {
  const alpha = [1], sigma = [0];
  for (let step = 0, alpha_bar = 1; step < NUM_STEPS; step++) {
    alpha_bar *= 1 - (1e-4 + (2e-2 - 1e-4) * step / (NUM_STEPS - 1));
    alpha.push(Math.fround(Math.sqrt(alpha_bar)));
    sigma.push(Math.fround(Math.sqrt(1 - alpha_bar)));
  }
  return { alpha, sigma, lam: alpha.map((a, i) => Math.log(a / sigma[i])) };
}

/** The timesteps of DPM-Solver++: evenly spaced in λ = log(α / σ) from 1000 down to 5, then one step to 0, which is clean. */
function sampling_times(steps, lam) {
  const times = new Set();
  for (let i = 0; i < steps; i++) {
    const goal = lam[NUM_STEPS] + (lam[5] - lam[NUM_STEPS]) * (steps > 1 ? i / (steps - 1) : 0);
    let nearest = 1;
    for (let t = 2; t <= NUM_STEPS; t++) if (Math.abs(lam[t] - goal) < Math.abs(lam[nearest] - goal)) nearest = t;
    times.add(nearest);
  }
  return [...times, 0];
}

/** Generates latents of a label from noise [N * d]: yields the prediction of θ_0 at each step; the last one is the result. */
function* generate(model, label, noise, steps = 20, guidance = 2) {
  const { alpha, sigma, lam } = noise_schedule(), times = sampling_times(steps, lam);
  const none = model.config.num_classes, n = noise.length;
  let x = noise, before = null, x0_before = null;
  for (let i = 0; i + 1 < times.length; i++) {
    const now = times[i], then = times[i + 1];
    let eps;
    if (guidance === 1) eps = model.forward(x, now, [label]);
    else { // the second half of the batch has no class
      const both = model.forward(Float32Array.from({ length: 2 * n }, (_, j) => x[j % n]), now, [label, none]);
      eps = both.subarray(0, n).map((with_class, j) => both[n + j] + guidance * (with_class - both[n + j]));
    }
    const x0 = x.map((v, j) => (v - sigma[now] * eps[j]) / alpha[now]);
    // DPM-Solver++(2M) is the DDIM step with θ_0 extrapolated linearly from the last two predictions to half of the step.
    if (before !== null && then > 0) {
      const ratio = (lam[then] - lam[now]) / (lam[now] - lam[before]);
      eps = x.map((v, j) => (v - alpha[now] * (x0[j] + ratio / 2 * (x0[j] - x0_before[j]))) / sigma[now]);
    }
    [before, x0_before] = [now, x0];
    x = reverse_step(x, eps, alpha[now], sigma[now], alpha[then], sigma[then]);
    yield x0;
  }
}

/** From θ_τ and its noise to a less noisy θ, the deterministic DDIM step: α' θ_0 + σ' ε with θ_0 = (θ - σ ε) / α. */
function reverse_step(x, eps, alpha, sigma, alpha_next, sigma_next) {
  return x.map((v, j) => alpha_next * (v - sigma * eps[j]) / alpha + sigma_next * eps[j]);
}

/** The same normal numbers as torch.randn on a CPU: Mersenne Twister, and Box-Muller in groups of 16; count >= 16. */
function randn(seed, count) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ state[i - 1] >>> 30) + i;
  let next = 624;
  const uniform = () => {
    if (next === 624) for (let i = next = 0; i < 624; i++) {
      const y = state[i] & 0x80000000 | state[(i + 1) % 624] & 0x7fffffff;
      state[i] = state[(i + 397) % 624] ^ y >>> 1 ^ (y & 1 ? 0x9908b0df : 0);
    }
    let y = state[next++];
    y ^= y >>> 11;
    y ^= y << 7 & 0x9d2c5680;
    y ^= y << 15 & 0xefc60000;
    return ((y ^ y >>> 18) & 0xffffff) / 2 ** 24;
  };
  const x = Float32Array.from({ length: count }, uniform);
  const box_muller = at => {
    for (let j = at; j < at + 8; j++) {
      const radius = Math.sqrt(-2 * Math.log(1 - x[j])), angle = 2 * Math.PI * x[j + 8];
      x[j] = radius * Math.cos(angle);
      x[j + 8] = radius * Math.sin(angle);
    }
  };
  for (let at = 0; at + 16 <= count; at += 16) box_muller(at);
  if (count % 16) { // the last 16 are drawn again
    for (let j = count - 16; j < count; j++) x[j] = uniform();
    box_muller(count - 16);
  }
  return x;
}
