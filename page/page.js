"use strict";
// The controls. Videos A and B are latents of the denoiser; the video shown is an interpolation of their tokens.

const $ = id => document.getElementById(id), value = id => Number($(id).value);

/** The description and networks of the page (load_dit), and whether matrix products use SIMD. */
function open_page() {
  const about = JSON.parse($("about").textContent), { dit_config: d, nerv_config: n } = about;
  let weights = from_half(new Uint16Array(bytes_of($("weights").textContent).buffer)), simd = true;
  const channels = n.last_factor * n.width, maps = 6 * (n.resolution + 2) ** 2 * channels; // the most that a product needs
  try {
    weights = use_simd(bytes_of(about.product), weights, maps + 16 * channels ** 2 + 16 * d.num_tokens * d.width);
  } catch (error) { // browsers before 2023
    simd = false;
  }
  return { ...about, ...load_dit(about, weights), simd, count: weights.length };
}

const model = open_page(), { num_frames: T, resolution: size, num_tokens: N, token_dim } = model.nerv_config;
const EARLIEST = -T / 4, LATEST = T - 1 + T / 2, FPS = 12, WATCH = 2200; // frames, frames, frames per second, milliseconds
const videos = { A: null, B: null }; // {label, seed, guidance, steps, path: latents at each step of the denoising, noise first}
const state = {
  chosen: "A", off: new Set(), // tokens that are switched off
  frame: null, whole: null, stale: true, // functions of time, without and with tokens that are off; whether they are outdated
  playing: true, drawn: null, watching: 0, // whether time advances, the time drawn last, when watching denoising began
  jobs: { A: 0, B: 0 }, took: 0, cost: 0, // generations started; milliseconds of the last one and of a frame
};

// ---------------------------------------------------------------------------------------------------------------- pictures

/** Draws [height, width, 3] in [-1, 1], or [height, width, 4] of bytes. */
function show(canvas, pixels, width = size, height = size) {
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const image = new ImageData(width, height);
  if (pixels.length === image.data.length) image.data.set(pixels);
  else image.data.fill(255), pixels.forEach((v, i) => { image.data[i + Math.floor(i / 3)] = (v + 1) * 127.5; });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Sets RGBA for an entry of a kernel or token: orange if positive, blue if negative, grey if shared; transparent near zero. */
function colour(pixels, at, v, scale, shared = false) {
  const [red, green, blue] = shared ? [140, 140, 140] : v > 0 ? [240, 110, 30] : [40, 130, 230];
  pixels[4 * at] = red;
  pixels[4 * at + 1] = green;
  pixels[4 * at + 2] = blue;
  pixels[4 * at + 3] = 255 * Math.abs(v) * scale; // clamped
}

function show_kernels(tokens) {
  model.nerv.layers().forEach((conv, i) => {
    const { in_ch, out_ch, k, block_in, block_out } = conv, width = in_ch * k, pixels = new Uint8ClampedArray(4 * width * out_ch * k);
    const W = conv.kernel(tokens, state.off), scale = 0.4 / Math.sqrt(W.reduce((sum, w) => sum + w * w, 0) / W.length);
    for (let o = 0, at = 0; o < out_ch; o++) for (let n = 0; n < in_ch; n++) for (let y = 0; y < k; y++) for (let x = 0; x < k; x++)
      colour(pixels, (o * k + y) * width + n * k + x, W[at++], scale, o >= block_out || n >= block_in);
    show($("kernels").children[i].firstChild, pixels, width, out_ch * k);
  });
}

function show_tokens(tokens) {
  const side = Math.ceil(Math.sqrt(token_dim)), power = tokens.reduce((sum, v) => sum + v * v, 1e-8) / tokens.length;
  const scale = 0.5 / Math.sqrt(power);
  [...$("tokens").children].forEach((button, n) => {
    const pixels = new Uint8ClampedArray(4 * side * side);
    for (let i = 0; i < token_dim; i++) colour(pixels, i, tokens[n * token_dim + i], scale);
    show(button.firstChild, pixels, side, side);
  });
}

// -------------------------------------------------------------------------------------------------------------------- videos

/** Weight tokens [N, d] of A or B; for the chosen one, at the selected step of its denoising. */
function tokens_of(which) {
  const { path } = videos[which];
  return model.latent_map.inverse(path[which === state.chosen ? value("step") : path.length - 1]);
}

/** Weight tokens of the video shown: λ B + (1 - λ) A. */
function tokens_shown() {
  const walk = value("walk"), a = tokens_of("A"), b = videos.B && tokens_of("B");
  return walk === 0 || !b ? a : walk === 1 ? b : a.map((x, i) => (1 - walk) * x + walk * b[i]);
}

function rebuild() {
  const tokens = tokens_shown();
  state.frame = model.nerv.forward(tokens, state.off);
  state.whole = state.off.size ? model.nerv.forward(tokens) : null;
  show_kernels(tokens);
  show_tokens(tokens);
  $("painted").className = state.whole ? "some" : "";
  state.stale = false;
  report();
}

/** Generates a new A or B, then shows its denoising if `watch`. */
async function generate_video(which, { label, seed, guidance, steps }, watch = false) {
  const job = ++state.jobs[which], began = performance.now(), { dit_config: c } = model, path = [randn(seed, c.num_tokens * c.token_dim)];
  let rest = began;
  for (const x0 of generate(model.dit, label, path[0], steps, guidance)) {
    path.push(x0);
    if (performance.now() - rest > 40) {
      await breathe();
      if (job !== state.jobs[which]) return; // a newer one has started
      rest = performance.now();
    }
  }
  state.took = performance.now() - began;
  videos[which] = { label, seed, guidance, steps, path };
  const still = document.querySelector(`#${which} canvas`);
  show(still, model.nerv.forward(model.latent_map.inverse(path.at(-1)))(T / 2));
  still.setAttribute("aria-label", `video ${which}, ${name_of(label)}`);
  if (which === state.chosen) choose(which, watch);
  state.stale = true;
}

/** Makes A or B the video that the controls change. */
function choose(which, watch = false) {
  const { label, seed, guidance, steps, path } = videos[which];
  state.chosen = which;
  for (const id of ["A", "B"]) $(id).setAttribute("aria-pressed", id === which);
  [...$("classes").children].forEach((button, i) => button.setAttribute("aria-pressed", i === label));
  Object.entries({ seed, guidance, steps }).forEach(([id, v]) => { $(id).value = v; });
  $("step").max = path.length - 1;
  watch = watch && !matchMedia("(prefers-reduced-motion: reduce)").matches;
  $("step").value = watch ? 0 : path.length - 1;
  state.watching = watch ? performance.now() : 0;
  state.stale = true;
}

const breathe = () => new Promise(done => setTimeout(done)); // keeps the page responsive
const name_of = label => model.classes[label].replaceAll("_", " ");

// ---------------------------------------------------------------------------------------------------------------------- time

let last = 0;
function draw(now) {
  requestAnimationFrame(draw);
  const passed = now - last;
  if (passed < 30) return;
  last = now;
  if (state.watching) {
    const step = Math.min(Math.floor((performance.now() - state.watching) / WATCH * $("step").max), Number($("step").max));
    if (step !== value("step")) { $("step").value = step; state.stale = true; }
    if (step === Number($("step").max)) state.watching = 0;
  }
  let t = value("time");
  if (state.playing) {
    const [first, end] = $("beyond").checked ? [EARLIEST, LATEST] : [0, T - 1];
    t += Math.min(passed, 200) / 1000 * FPS * 2 ** value("speed");
    if (t > end + 0.5 || t < first) t = first; // pause half a frame at the end
    $("time").value = t;
  }
  if (!state.stale && t === state.drawn) return;
  if (state.stale) rebuild();
  state.drawn = t;
  const start = performance.now(), frame = state.frame(t);
  state.cost += 0.1 * (performance.now() - start - state.cost || 0);
  show($("video"), frame);
  show_change(frame, t);
  report();
}

/** Shows what the tokens that are off contributed: the difference, scaled to full brightness. */
function show_change(frame, t) {
  if (!state.whole) return;
  const change = state.whole(t).map((v, i) => Math.abs(v - frame[i]));
  const most = change.reduce((a, b) => Math.max(a, b), 0.02);
  show($("change"), change.map(v => 2 * v / most - 1));
}

/** Updates the text beside the controls and below the video. */
function report() {
  const put = (element, text) => { if (element.textContent !== text) element.textContent = text; };
  const beside = (id, text) => put($(id).nextElementSibling, text), t = value("time"), walk = value("walk"), step = value("step");
  const { label, seed, guidance, steps, path } = videos[state.chosen], { A, B } = videos;
  beside("step", step ? `${step} of ${path.length - 1}` : "noise");
  beside("speed", `${(2 ** value("speed")).toFixed(2)} ×`);
  beside("guidance", value("guidance").toFixed(2));
  beside("steps", value("steps").toString());
  put($("at"), t.toFixed(2));
  const between = walk > 0 && walk < 1 && B, share = Math.round(100 * walk);
  const text = [
    between ? `${100 - share} % ${name_of(A.label)}, ${share} % ${name_of(B.label)}` : name_of((walk === 1 && B || A).label),
    step === path.length - 1 ? "" : step ? `denoising, step ${step} of ${path.length - 1}` : "noise",
    t < 0 ? "before the start" : t > T - 0.5 ? "beyond the end" : "",
    state.off.size ? `tokens off: ${state.off.size}` : "",
  ].filter(Boolean).join(" · ");
  if ($("caption").textContent !== text) $("video").setAttribute("aria-label", text);
  put($("caption"), text);
  put($("python"), `python sample.py --classes ${label} --seed ${seed} --guidance ${guidance} --steps ${steps}`);
  const how = model.simd ? "" : ", without SIMD";
  put($("cost"), `A new video took ${Math.round(state.took)} ms, a frame takes ${state.cost.toFixed(1)} ms${how}.`);
}

function play(on) {
  state.playing = on;
  $("play").textContent = on ? "❚❚" : "▶";
  $("play").setAttribute("aria-pressed", on);
}

// ---------------------------------------------------------------------------------------------------------------- link, file

/** The URL of this page with its state in the fragment. */
function link() {
  const fields = { chosen: state.chosen };
  for (const [which, v] of Object.entries(videos)) if (v) fields[which] = [v.label, v.seed, v.guidance, v.steps].join();
  if (value("step") < $("step").max) fields.step = value("step");
  if (value("walk")) fields.walk = value("walk").toFixed(3);
  if (state.off.size) fields.off = [...state.off].join();
  if (!state.playing) fields.time = value("time").toFixed(2);
  if (value("speed")) fields.speed = value("speed").toFixed(2);
  if ($("beyond").checked) fields.beyond = 1;
  return `${location.href.split("#")[0]}#${Object.entries(fields).map(pair => pair.join("=")).join("&")}`;
}

/** Restores the state of a link, or shows the first video; invalid or out-of-range numbers get default values. */
async function follow(fragment, watch) {
  const fields = new URLSearchParams(fragment), { guidance, steps, seed } = model.defaults;
  const number = (text, least, most, otherwise) => text && Number(text) >= least && Number(text) <= most ? Number(text) : otherwise;
  const video = (text, label, own) => {
    const [l, s, g, n] = (text ?? "").split(",");
    return {
      label: Math.floor(number(l, 0, model.classes.length - 1, label)), seed: Math.floor(number(s, 0, 2 ** 32 - 1, own)),
      guidance: number(g, 0, $("guidance").max, guidance), steps: Math.floor(number(n, 1, $("steps").max, steps)),
    };
  };
  state.off = new Set((fields.get("off") ?? "").split(",").map(text => number(text, 0, N - 1, -1)).filter(Number.isInteger));
  state.off.delete(-1);
  mark_tokens();
  state.chosen = "A";
  await generate_video("A", video(fields.get("A"), 0, seed), watch && !fields.has("step"));
  $("walk").value = number(fields.get("walk"), 0, 1, 0);
  $("speed").value = number(fields.get("speed"), -5, 2, 0);
  $("beyond").checked = fields.has("beyond");
  $("time").value = number(fields.get("time"), EARLIEST, LATEST, 0);
  play(!fields.has("time") && !matchMedia("(prefers-reduced-motion: reduce)").matches);
  document.querySelector("main").inert = false;
  if (!last) draw(performance.now());
  await breathe(); // show the first video before generating the second
  await generate_video("B", video(fields.get("B"), model.classes.length - 1, seed + 1));
  if (fields.get("chosen") === "B") choose("B");
  if (fields.has("step")) $("step").value = number(fields.get("step"), 0, $("step").max, $("step").max);
  state.stale = true;
}

async function save() {
  $("save").disabled = true;
  const [first, end] = $("beyond").checked ? [EARLIEST, LATEST] : [0, T - 1], speed = FPS * 2 ** value("speed"), frames = [];
  const count = Math.min(150, Math.max(2, Math.round((end - first) / speed * 25))), net = state.frame; // 25 a second
  for (let i = 0; i < count; i++) {
    frames.push(net(first + (end - first) * i / (count - 1)));
    $("done").textContent = `${Math.round(100 * (i + 1) / count)} %`;
    await breathe();
  }
  const file = URL.createObjectURL(new Blob([gif(frames, size, Math.max(1, Math.round(320 / size)), 4)], { type: "image/gif" }));
  Object.assign(document.createElement("a"), { href: file, download: `nerv-diffusion-${videos[state.chosen].seed}.gif` }).click();
  setTimeout(() => URL.revokeObjectURL(file), 10000);
  $("done").textContent = "saved";
  $("save").disabled = false;
}

async function copy() {
  const address = link();
  location.replace(address);
  try {
    await navigator.clipboard.writeText(address);
    $("done").textContent = "copied";
  } catch (error) {
    $("done").textContent = "it is in the address bar";
  }
}

// ------------------------------------------------------------------------------------------------------------------ controls

function mark_tokens() {
  [...$("tokens").children].forEach((button, n) => button.setAttribute("aria-pressed", !state.off.has(n)));
  state.stale = true;
}

/** Switches off the eight tokens that change the middle frame most; the effect of fewer is hard to see. */
async function eight_off() {
  const tokens = tokens_shown(), whole = model.nerv.forward(tokens)(T / 2), change = [];
  for (let n = 0; n < N; n++) {
    change.push(model.nerv.forward(tokens, new Set([n]))(T / 2).reduce((sum, v, i) => sum + (v - whole[i]) ** 2, 0));
    await breathe();
  }
  state.off = new Set(change.map((_, n) => n).sort((a, b) => change[b] - change[a]).slice(0, 8));
  mark_tokens();
}

const add = (parent, tag, properties) => $(parent).appendChild(Object.assign(document.createElement(tag), properties));
model.classes.forEach((_, label) => add("classes", "button", { textContent: name_of(label), onclick: () => make({ label }, true) }));
for (let n = 0; n < N; n++) {
  const onclick = () => { state.off.has(n) ? state.off.delete(n) : state.off.add(n); mark_tokens(); };
  add("tokens", "button", { onclick, title: `token ${n + 1}` }).append(document.createElement("canvas"));
}
for (const { name, in_ch, out_ch, k } of model.nerv.layers()) {
  const short = name.replace(/^(nerv\.)+/, "").replace(/s\.(\d)/g, (_, i) => ` ${+i + 1}`).replaceAll(".", " "); // block 1 conv 2
  const figure = add("kernels", "figure", { title: `${in_ch} → ${out_ch} channels, ${k} × ${k}` });
  figure.append(document.createElement("canvas"), Object.assign(document.createElement("figcaption"), { textContent: short }));
}
$("size").textContent = `${(model.count / 1e6).toFixed(1)} million`;
for (const id of ["guidance", "steps"]) $(id).max = Math.max($(id).max, model.defaults[id]);
Object.assign($("time"), { min: EARLIEST, max: LATEST, value: 0 });
const percent = frames => `${100 * frames / (LATEST - EARLIEST)}%`; // marks the clip on the time slider
document.querySelector(".time").style.cssText = `--from: ${percent(-EARLIEST)}; --to: ${percent(LATEST - T + 1)}`;

/** Moves the walk to A or B. */
function go(which) { $("walk").value = which === "A" ? 0 : 1; }
/** Generates the chosen video again with other settings. */
function make(changes, watch) {
  go(state.chosen);
  return generate_video(state.chosen, { ...videos[state.chosen], ...changes }, watch);
}
$("new").onclick = () => make({ seed: Math.floor(Math.random() * 1e6) }, true);
$("again").onclick = () => { go(state.chosen); choose(state.chosen, true); };
$("seed").onchange = () => make({ seed: Math.floor(Math.min(Math.max(value("seed"), 0), 2 ** 32 - 1)) }, true);
for (const id of ["guidance", "steps"]) $(id).oninput = () => make({ [id]: value(id) });
for (const id of ["A", "B"]) $(id).onclick = () => { if (videos[id]) { go(id); choose(id); } };
$("step").oninput = () => { state.watching = 0; state.stale = true; };
$("walk").oninput = () => { state.stale = true; };
$("time").oninput = () => play(false);
$("speed").oninput = $("beyond").oninput = () => report();
$("play").onclick = () => play(!state.playing);
$("eight").onclick = eight_off;
$("all").onclick = () => { state.off.clear(); mark_tokens(); };
$("link").onclick = copy;
$("save").onclick = save;

function shift(frames) {
  play(false);
  $("time").value = value("time") + frames;
}
let held = null; // x position of a finger or the mouse that drags the video
$("video").onpointerdown = event => { held = event.clientX; $("video").setPointerCapture(event.pointerId); };
$("video").onpointermove = event => {
  if (held === null || event.clientX === held) return;
  shift((event.clientX - held) / $("video").clientWidth * T);
  held = event.clientX;
};
$("video").onpointerup = $("video").onpointercancel = () => { held = null; };
document.onkeydown = event => {
  if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|BUTTON/.test(event.target.tagName) && event.key !== "n") return;
  const keys = { " ": () => play(!state.playing), n: $("new").onclick, ArrowLeft: () => shift(-0.25), ArrowRight: () => shift(0.25) };
  if (!keys[event.key]) return;
  keys[event.key]();
  event.preventDefault();
};
onhashchange = () => { if (location.href !== link()) follow(location.hash.slice(1)); };

follow(location.hash.slice(1), true).then(() => { document.documentElement.dataset.ready = "yes"; });
