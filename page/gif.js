"use strict";
// Writes an endlessly looping GIF (GIF89a specification): one palette of 256 colours for all frames, LZW.

/** Up to 256 colours for pixels [n, 3]: repeatedly splits the box with the longest side at its mean, as median cut does. */
function palette_of(pixels) {
  const box = members => {
    const channels = [0, 1, 2].map(ch => members.map(i => pixels[3 * i + ch]));
    const spread = channels.map(values => values.reduce((a, b) => Math.max(a, b)) - values.reduce((a, b) => Math.min(a, b)));
    const mean = channels.map(values => values.reduce((a, b) => a + b) / values.length);
    const widest = spread.indexOf(Math.max(...spread));
    return { members, mean, widest, spread: spread[widest] };
  };
  const boxes = [box(Array.from({ length: pixels.length / 3 }, (_, i) => i))];
  while (boxes.length < 256) {
    const cut = boxes.reduce((a, b) => b.spread > a.spread ? b : a);
    if (!cut.spread) break;
    const low = i => pixels[3 * i + cut.widest] <= cut.mean[cut.widest];
    boxes.splice(boxes.indexOf(cut), 1, box(cut.members.filter(low)), box(cut.members.filter(i => !low(i))));
  }
  return boxes.map(({ mean }) => mean.map(Math.round));
}

/** LZW codes of 9 to 12 bits, as bytes, for numbers 0 … 255. */
function lzw(numbers) {
  const bytes = [], table = new Uint16Array(4096 * 256); // [code of a sequence, next number] -> code
  let next = 258, bits = 9, held = 0, count = 0, prefix = numbers[0];
  const put = code => { for (held |= code << count, count += bits; count >= 8; count -= 8, held >>>= 8) bytes.push(held & 255); };
  put(256);
  for (let i = 1; i < numbers.length; i++) {
    const key = prefix << 8 | numbers[i];
    if (table[key]) { prefix = table[key]; continue; }
    put(prefix);
    prefix = numbers[i];
    if (next === 4095) { // table full: start over
      put(256);
      table.fill(0);
      [next, bits] = [258, 9];
    } else {
      if (next === 1 << bits) bits++;
      table[key] = next++;
    }
  }
  put(prefix);
  put(257);
  if (count) bytes.push(held & 255);
  return bytes;
}

/** Frames [size, size, 3] in [-1, 1], enlarged `scale` times, shown for `delay` hundredths of a second -> bytes of a GIF. */
function gif(frames, size, scale, delay) {
  const byte = v => Math.min(255, Math.max(0, Math.round((v + 1) * 127.5))), short = n => [n & 255, n >> 8], wide = size * scale;
  const every = Math.max(1, Math.floor(frames.length * size * size / 20000)), sample = []; // 20,000 pixels are enough
  for (const [f, frame] of frames.entries())
    for (let i = f % every; i < size * size; i += every) sample.push(...frame.subarray(3 * i, 3 * i + 3));
  const palette = palette_of(sample.map(byte)), nearest = new Map();
  const find = (r, g, b) => {
    const key = r << 16 | g << 8 | b, distance = c => (c[0] - r) ** 2 + (c[1] - g) ** 2 + (c[2] - b) ** 2;
    if (!nearest.has(key)) nearest.set(key, palette.reduce((best, c, i) => distance(c) < distance(palette[best]) ? i : best, 0));
    return nearest.get(key);
  };
  const out = [..."GIF89a"].map(c => c.charCodeAt()).concat(short(wide), short(wide), [0xf7, 0, 0]);
  for (let i = 0; i < 256; i++) out.push(...palette[i] ?? [0, 0, 0]);
  out.push(0x21, 0xff, 11, ...[..."NETSCAPE2.0"].map(c => c.charCodeAt()), 3, 1, 0, 0, 0);
  for (const frame of frames) {
    const small = Uint8Array.from({ length: size * size }, (_, i) => find(...frame.subarray(3 * i, 3 * i + 3).map(byte)));
    const numbers = new Uint8Array(wide * wide);
    for (let y = 0, i = 0; y < wide; y++) for (let x = 0; x < wide; x++)
      numbers[i++] = small[Math.floor(y / scale) * size + Math.floor(x / scale)];
    out.push(0x21, 0xf9, 4, 0, ...short(delay), 0, 0, 0x2c, 0, 0, 0, 0, ...short(wide), ...short(wide), 0, 8);
    const bytes = lzw(numbers);
    for (let i = 0; i < bytes.length; i += 255) out.push(Math.min(255, bytes.length - i), ...bytes.slice(i, i + 255));
    out.push(0);
  }
  return Uint8Array.from([...out, 0x3b]);
}
