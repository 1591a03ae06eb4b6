// What the page shows of the models, and what can be done with them. A section whose model is not there is left out.

const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const { classes, colors, labels, height, width } = data;
const { main, vamp, map = main } = Object.fromEntries(Object.entries(data.models).map(([role, m]) => [role, readModel(m)]));
const bytes = readBytes(data.images);  // of images whose posterior means are the first of each model's points
const images = Array.from({ length: bytes.length / (height * width) }, (_, i) => {
  return Float32Array.from(bytes.subarray(i * height * width, (i + 1) * height * width), byte => byte / 255);
});
const DOTS = 500;  // of the points, on a map
const EXTENT = 4;  // sliders and maps show latents from -EXTENT to EXTENT
const clamp = value => Math.max(-EXTENT, Math.min(EXTENT, value));
const latentName = latent => `z${[...String(latent + 1)].map(digit => "₀₁₂₃₄₅₆₇₈₉"[digit]).join("")}`;
const signed = (value, digits = 2) => value.toFixed(digits).replace(/^-0\.?0*$/, "0").replace("-", "−");

// ---------------------------------------------------------------------------------------------------------------------
// Work is done by named generators, which get 6 ms of each frame. What one does until a yield takes a few ms at most

const jobs = new Map();

function refresh(name, job) {  // the latest job of a name takes the place of the one before
  if (!jobs.size) requestAnimationFrame(runJobs);
  jobs.set(name, job);
}

function runJobs() {
  const start = performance.now();
  for (const [name, job] of jobs) {
    let done;
    do { done = job.next().done; } while (!done && performance.now() - start < 6);
    if (done && jobs.get(name) === job) jobs.delete(name);
  }
  if (jobs.size) requestAnimationFrame(runJobs);
}

// ---------------------------------------------------------------------------------------------------------------------
// Elements

function make(tag, parent, properties = {}) {
  const element = Object.assign(document.createElement(tag), properties);
  parent.append(element);
  return element;
}

function makeSvg(tag, parent, attributes = {}) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  setAttributes(element, attributes);
  parent.append(element);
  return element;
}

const setAttributes = (element, attributes) => Object.entries(attributes).forEach(pair => element.setAttribute(...pair));

function setText(element, text) {  // only where it changes, since screen readers may read it aloud
  if (element.textContent !== text) element.textContent = text;
}

function resize(canvas, columns, rows) {  // to so many images, and empties it
  canvas.width = columns * width;
  canvas.height = rows * height;
}

function put(canvas, pixels, column = 0, row = 0) {  // one image, among others
  const image = new ImageData(width, height), words = new Uint32Array(image.data.buffer);
  pixels.forEach((p, i) => { words[i] = 0xff000000 + 0x010101 * Math.round(255 * p); });
  canvas.getContext("2d").putImageData(image, column * width, row * height);
}

function show(id, pixels, description) {
  const canvas = byId(id);
  if (canvas.height !== height || canvas.width !== width) resize(canvas, 1, 1);
  put(canvas, pixels);
  canvas.setAttribute("aria-label", description);
}

function makeSliders(box, model, onInput) {  // of all latents, those that say most first -> sliders by latent
  const sliders = [];
  for (const latent of model.order) {
    const label = make("label", box, { className: "slider" });
    label.append(latentName(latent));
    sliders[latent] = make("input", label, { type: "range", min: -EXTENT, max: EXTENT, step: 0.01, value: 0 });
    sliders[latent].setAttribute("aria-label", `Latent ${latent + 1}`);
    sliders[latent].oninput = () => onInput(latent, Number(sliders[latent].value));
    make("output", label);
  }
  return sliders;
}

function setSlider(slider, value, text = signed(value)) {
  slider.value = value;
  slider.setAttribute("aria-valuetext", text);
  setText(slider.nextElementSibling, text);
}

// ---------------------------------------------------------------------------------------------------------------------
// The map: two latents of a model, with the posterior means of images as dots. One latent unit is 100 long

function makeMap(box) {
  const [across, up] = map.order, at = mu => ({ cx: 100 * mu[across], cy: -100 * mu[up] });
  const canvas = make("canvas", box), size = 100 * EXTENT;
  const svg = makeSvg("svg", box, { viewBox: `${-size} ${-size} ${2 * size} ${2 * size}`, "aria-hidden": true });
  for (let value = 1 - EXTENT; value < EXTENT; value++) {
    const kind = value ? "grid" : "axis";
    makeSvg("path", svg, { class: kind, d: `M${100 * value} ${-size}V${size}M${-size} ${100 * value}H${size}` });
  }
  const dots = makeSvg("g", svg, { class: "dots" });
  map.points.slice(0, DOTS).forEach((mu, i) => makeSvg("circle", dots, { ...at(mu), r: 5, fill: colors[labels[i]] }));
  if (classes.length <= 20) {
    stops.forEach(({ label, mu }) => {
      const { cx: x, cy: y } = at(mu);
      makeSvg("text", svg, { x, y }).textContent = classes[label];
    });
  }
  const path = makeSvg("path", svg, { class: "path" }), cross = makeSvg("path", svg, { class: "cross" });
  const ellipses = [2, 1].map(sigmas => [sigmas, makeSvg("ellipse", svg, { class: "spread" })]);
  const marker = makeSvg("circle", svg, { class: "marker", r: 14 });
  function place(mu, std) {  // a point, or a posterior: ellipses of one and two standard deviations
    const { cx, cy } = at(mu);
    if (!std) return setAttributes(marker, { cx, cy });
    marker.remove();
    setAttributes(cross, { d: `M${cx} ${-size}V${size}M${-size} ${cy}H${size}` });
    ellipses.forEach(([n, ellipse]) => setAttributes(ellipse, { cx, cy, rx: 100 * n * std[across], ry: 100 * n * std[up] }));
  }
  return { canvas, dots, path, place };
}

const stops = [...new Set(labels)].sort((a, b) => a - b)  // where each class is labelled, and a flight passes
  .map(label => ({ label, mu: mostTypical(map.points.slice(0, DOTS), labels, label) })).filter(({ mu }) => mu);

function* drawManifold(canvases, tiles = 24) {  // of a model of two latents, from the centre outwards
  const columns = Math.round(tiles * Math.sqrt(height / width)), rows = Math.round(tiles * Math.sqrt(width / height));
  canvases.forEach(canvas => resize(canvas, columns, rows));
  const places = Array.from({ length: rows * columns }, (_, i) => [i % columns, Math.floor(i / columns)])
    .map(([column, row]) => ({ column, row, z: [(2 * column + 1) / columns - 1, 1 - (2 * row + 1) / rows].map(s => EXTENT * s) }))
    .sort((a, b) => Math.hypot(...a.z) - Math.hypot(...b.z));
  for (const { column, row, z } of places) {
    const pixels = map.decode(z);
    canvases.forEach(canvas => put(canvas, pixels, column, row));
    yield;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The image at hand: a drawing, or one of the images in the page. Three sections look at it

const input = { pixels: images[0], name: "", listeners: [] };

function setInput(pixels, name) {
  Object.assign(input, { pixels, name });
  input.listeners.forEach(listener => listener());
}

// ---------------------------------------------------------------------------------------------------------------------
// Draw

function startDraw() {
  const pad = byId("pad"), context = pad.getContext("2d"), drawMap = makeMap(byId("draw-map"));
  let strokes = [], turn = 0;
  pad.width = 600;
  pad.height = Math.round(600 * height / width);
  const bars = main.order.map(latent => {
    const bar = make("div", byId("posterior"), { className: "latent" });
    make("span", bar, { textContent: latentName(latent) });
    return bar;
  });

  function clearPad() {
    strokes = [];
    context.fillRect(0, 0, pad.width, pad.height);
  }

  function showImage(i) {
    clearPad();
    const canvas = document.createElement("canvas");
    resize(canvas, 1, 1);
    put(canvas, images[i]);
    context.imageSmoothingEnabled = false;
    context.drawImage(canvas, 0, 0, pad.width, pad.height);
    setInput(images[i], `an image of class ${classes[labels[i]]}`);
  }

  function extend(event) {  // the stroke in progress, to where the pointer is
    const box = pad.getBoundingClientRect(), stroke = strokes.at(-1);
    stroke.push([(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.width]);
    const ends = stroke.slice(-2).map(point => point.map(share => share * pad.width));
    Object.assign(context, { strokeStyle: "white", lineWidth: 2 * PEN / 28 * Math.min(pad.width, pad.height), lineCap: "round", lineJoin: "round" });
    context.beginPath();
    context.moveTo(...ends[0]);
    context.lineTo(...ends.at(-1));
    context.stroke();
  }

  pad.addEventListener("pointerdown", event => {
    if (!event.isPrimary) return;
    pad.setPointerCapture(event.pointerId);
    if (!strokes.length) clearPad();
    strokes.push([]);
    extend(event);
    refresh("drawing", take());
  });
  pad.addEventListener("pointermove", event => {
    if (!event.isPrimary || !pad.hasPointerCapture(event.pointerId)) return;
    extend(event);
    refresh("drawing", take());
  });
  byId("clear").onclick = () => {
    clearPad();
    setInput(new Float32Array(height * width), "nothing");
  };
  byId("next").onclick = () => showImage(turn = (turn + 1) % images.length);

  function* take() {
    setInput(rasterize(strokes, height, width), "your drawing");
  }

  function* read() {
    const { pixels, name } = input, { mu, std } = main.encode(pixels), rebuilt = main.decode(mu);
    const verdict = name === "nothing" ? "" : classes[nearestClass(main.points, labels, mu)];
    pad.setAttribute("aria-label", `Drawing area, for mouse or finger. It shows ${name}`);
    show("read", pixels, `What the encoder reads: ${name}`);
    show("rebuilt", rebuilt, `Reconstruction of ${name}${verdict && `, which looks like ${verdict}`}`);
    setText(byId("verdict"), verdict && `Looks like ${verdict}`);
    const place = map === main ? { mu, std } : map.encode(pixels);
    drawMap.place(place.mu, place.std);
    const where = map.order.slice(0, 2).map(k => `${latentName(k)} ${signed(place.mu[k])} ± ${place.std[k].toFixed(2)}`);
    byId("draw-map").setAttribute("aria-label", `Map with the place of ${name}: ${where.join(", ")}`);
    main.order.forEach((k, i) => {
      bars[i].style.setProperty("--mu", clamp(mu[k]).toFixed(3));
      bars[i].style.setProperty("--std", std[k].toFixed(3));
    });
    const first = main.order.slice(0, 5).map(k => `${latentName(k)} ${signed(mu[k])} ± ${std[k].toFixed(2)}`);
    byId("posterior").setAttribute("aria-label", `Posterior means and spreads of ${name}: ${first.join(", ")}, and so on`);
  }

  input.listeners.push(() => refresh("draw", read()));
  showImage(0);
  return drawMap;
}

// ---------------------------------------------------------------------------------------------------------------------
// Walk

function startWalk() {
  const box = byId("walk-map"), walkMap = makeMap(box), [across, up] = map.order;
  let z = new Float64Array(map.size), chosen = -1, flying = 0, pressed = [0, 0];

  function* update() {
    const what = chosen < 0 ? "" : `, the mean of an image of class ${classes[labels[chosen]]}`;
    const where = `${latentName(across)} = ${signed(z[across])}, ${latentName(up)} = ${signed(z[up])}${what}`;
    show("walked", map.decode(z), `Image decoded from ${where}`);
    walkMap.place(z);
    if (!flying) setText(byId("walk-place"), where);
    box.setAttribute("aria-label", `Map, ${where}. Arrow keys move the point.`);
    sliders.forEach((slider, latent) => setSlider(slider, z[latent]));
  }

  function moveTo(place, point = -1) {
    [z, chosen] = [Float64Array.from(place), point];
    refresh("walk", update());
  }

  function setFlying(on) {
    cancelAnimationFrame(flying);
    flying = on ? requestAnimationFrame(fly) : 0;
    setText(byId("fly"), on ? "Pause" : "Fly");
    byId("fly").setAttribute("aria-pressed", on);
    walkMap.path.style.visibility = on ? "visible" : "hidden";
  }

  const means = stops.map(({ mu }) => mu);
  let flown = 0, before = null;  // stops passed, and the time of the last frame
  function fly(now) {
    if (before !== null) flown += Math.min(now - before, 100) / 2000;
    before = now;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    moveTo(closedPath(means, still ? Math.floor(flown) : flown));
    flying = requestAnimationFrame(fly);
  }

  const shift = (dx, dy) => Float64Array.from(z, (value, k) => clamp(value + (k === across ? dx : k === up ? dy : 0)));
  function place(event) {  // of the pointer, in the map's two latents
    const rect = box.getBoundingClientRect();
    return [(event.clientX - rect.left) / rect.width, (rect.bottom - event.clientY) / rect.height].map(s => clamp(EXTENT * (2 * s - 1)));
  }
  const pixels = distance => distance * box.clientWidth / (2 * EXTENT);
  const follow = ([x, y]) => moveTo(shift(x - z[across], y - z[up]));

  box.addEventListener("pointerdown", event => {
    box.setPointerCapture(event.pointerId);
    setFlying(false);
    pressed = place(event);
    const distances = map.points.slice(0, DOTS).map(mu => pixels(Math.hypot(mu[across] - pressed[0], mu[up] - pressed[1])));
    const nearest = distances.indexOf(Math.min(...distances));
    if (distances[nearest] < (event.pointerType === "touch" ? 10 : 5)) moveTo(map.points[nearest], nearest);
    else follow(pressed);
  });
  box.addEventListener("pointermove", event => {
    if (!box.hasPointerCapture(event.pointerId)) return;
    const at = place(event);
    const trembles = chosen >= 0 && pixels(Math.hypot(at[0] - pressed[0], at[1] - pressed[1])) < 8;  // not yet a drag
    if (!trembles) follow(at);
  });
  box.addEventListener("keydown", event => {
    const step = event.shiftKey ? 0.5 : 0.05;
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!way) return;
    event.preventDefault();
    setFlying(false);
    moveTo(shift(step * way[0], step * way[1]));
  });
  byId("dots").onchange = () => { walkMap.dots.style.display = byId("dots").checked ? "" : "none"; };
  const stopAt = place => { setFlying(false); moveTo(place); };
  byId("fly").onclick = () => { before = null; setFlying(!flying); };
  byId("jump").onclick = () => stopAt(map.drawPrior(Math.random)(1));
  byId("origin").onclick = () => stopAt(new Float64Array(map.size));

  const sliders = map.size === 2 ? [] : makeSliders(byId("walk-sliders"), map, (latent, value) => {
    stopAt(z.map((old, k) => k === latent ? value : old));
  });
  const route = Array.from({ length: 40 * means.length }, (_, i) => closedPath(means, i / 40));
  walkMap.path.setAttribute("d", `M${route.map(p => `${(100 * p[across]).toFixed(1)} ${(-100 * p[up]).toFixed(1)}`).join("L")}Z`);
  setText(byId("walk-text"), map.size === 2
    ? "A model of two latents has a map: each place on it decodes to an image. Dots are posterior means of images, in the colours of their classes."
    : `Each point of latent space decodes to an image. Across is ${latentName(across)} and up is ${latentName(up)}, the two latents that say most; ` +
      "below are sliders for all. Dots are posterior means of images, in the colours of their classes.");
  classes.forEach((name, label) => {
    const item = make("li", byId("legend"));
    make("i", item).style.background = colors[label];
    item.append(name);
  });
  setFlying(false);
  moveTo(z);
  return walkMap;
}

// ---------------------------------------------------------------------------------------------------------------------
// Mix

function startMix() {
  const STEPS = 11, strips = [byId("path-latents"), byId("path-pixels")], share = byId("share");
  strips.forEach(strip => resize(strip, STEPS, 1));
  const ends = ["from", "to"].map(name => {
    const select = byId(`${name}-class`), turn = { value: 0 };
    [...new Set(labels.slice(0, images.length))].sort((a, b) => a - b)
      .forEach(label => make("option", select, { value: label, textContent: classes[label] }));
    if (main.encode) make("option", select, { value: "drawing", textContent: "drawing" });
    const update = () => refresh("path", path());
    select.onchange = update;
    byId(`${name}-next`).onclick = () => { turn.value++; update(); };
    return { name, select, turn };
  });
  ends[1].select.value = ends[1].select.options[Math.min(8, ends[1].select.options.length - 1)].value;

  function ending({ name, select, turn }) {  // -> what is chosen for one end
    if (select.value === "drawing") {
      show(name, input.pixels, input.name);
      return { pixels: input.pixels, mu: main.encode(input.pixels).mu };
    }
    const own = images.map((_, i) => i).filter(i => labels[i] === Number(select.value)), i = own[turn.value % own.length];
    show(name, images[i], `An image of class ${classes[labels[i]]}`);
    return { pixels: images[i], mu: main.points[i] };
  }

  function* path() {  // both in full; each end may have changed
    const [from, to] = ends.map(ending);
    refresh("mix", mixed(from, to));
    share.oninput = () => refresh("mix", mixed(from, to));
    for (let step = 0; step < STEPS; step++) {
      const t = step / (STEPS - 1);
      put(strips[0], main.decode(mix(from.mu, to.mu, t)), step);
      put(strips[1], mix(from.pixels, to.pixels, t), step);
      yield;
    }
  }

  function* mixed(from, to) {
    const t = Number(share.value), percent = `${Math.round(100 * t)} %`;
    setText(share.nextElementSibling, percent);
    show("mixed-latents", main.decode(mix(from.mu, to.mu, t)), `Decoded ${percent} of the way in latent space`);
    show("mixed-pixels", mix(from.pixels, to.pixels, t), `Pixels blended, ${percent} of the way`);
  }

  input.listeners.push(() => {
    if (ends.some(({ select }) => select.value === "drawing")) refresh("path", path());
  });
  refresh("path", path());
}

// ---------------------------------------------------------------------------------------------------------------------
// Sample

function startSample() {
  const SIDE = 6, temperature = byId("temperature");
  const grids = [[main, "N(0, I)"], [vamp, "VampPrior"]].filter(([model]) => model).map(([model, prior]) => {
    const figure = make("figure", byId("grids"));
    const canvas = make("canvas", figure);
    resize(canvas, SIDE, SIDE);
    make("figcaption", figure, { textContent: `${prior}, ${model.size} latents` });
    return { model, prior, canvas };
  });
  setText(byId("sample-text"), "A draw of the prior, decoded, is an image that never was. " + (vamp
    ? "On the left the prior is the standard normal, on the right a mixture of posteriors that is learned with the networks, the VampPrior. "
    : "") + "The temperature is how far draws spread: low, they keep to what is likely; high, they leave what the decoder knows.");

  function draw(random) {
    grids.forEach(grid => { grid.draws = Array.from({ length: SIDE * SIDE }, () => grid.model.drawPrior(random)); });
    decode();
  }

  function* fill({ model, prior, canvas, draws }) {
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${SIDE * SIDE} samples from the prior ${prior}, at temperature ${temperature.value}`);
    for (let i = 0; i < draws.length; i++) {
      put(canvas, model.decode(draws[i](Number(temperature.value))), i % SIDE, Math.floor(i / SIDE));
      yield;
    }
  }

  function decode() {
    setText(temperature.nextElementSibling, Number(temperature.value).toFixed(2));
    grids.forEach(grid => refresh(`samples ${grid.prior}`, fill(grid)));
  }

  temperature.oninput = decode;
  byId("again").onclick = () => draw(Math.random);
  draw(generator(0));
}

// ---------------------------------------------------------------------------------------------------------------------
// Loss

function startLoss() {
  const toY = nats => Math.max(-5, Math.min(105, 80 - nats)).toFixed(2);
  const random = generator(1), noise = [0, 1].map(() => Float64Array.from(main.order, () => normal(random)));
  const draws = [...noise, ...noise.map(eps => eps.map(value => -value))];  // fixed, and mirrored: curves are smooth
  for (const nats of [0, 40]) makeSvg("path", byId("curve"), { class: "level", d: `M0 ${toY(nats)}H100` });
  const curves = ["total", "bce", "kl"].map(name => makeSvg("path", byId("curve"), { class: name }));
  const lines = ["own", "here"].map(name => makeSvg("path", byId("curve"), { class: name }));
  let own, posterior, latent = main.order[0];
  const sliders = makeSliders(byId("loss-sliders"), main, (k, value) => {
    latent = k;
    posterior.mu[k] = value;
    refresh("loss", update());
  });
  sliders.forEach((slider, k) => { slider.onfocus = () => { latent = k; refresh("loss", update()); }; });

  function loss({ mu, std, logvar }) {  // the negative ELBO's terms, with the cross-entropy's mean over the draws
    const bce = draws.map(eps => sum(bceByPixel(main.logits(mu.map((m, k) => m + std[k] * eps[k])), input.pixels)));
    return { bce: sum(bce) / draws.length, kl: sum(klByLatent({ mu, logvar })) };
  }

  function* update() {
    const kl = klByLatent(posterior), logits = main.logits(posterior.mu), byPixel = bceByPixel(logits, input.pixels);
    show("loss-rebuilt", logits.map(sigmoid), "Reconstruction from the sliders' means");
    show("loss-pixels", byPixel.map(nats => Math.min(1, nats / 3)), "Cross-entropy by pixel: white is 3 nats or more");
    sliders.forEach((slider, k) => setSlider(slider, posterior.mu[k], `${signed(posterior.mu[k])}, KL ${kl[k].toFixed(2)}`));
    yield;
    const now = loss(posterior), before = loss(own), total = now.bce + now.kl, best = before.bce + before.kl;
    setText(byId("nats"), `BCE ${now.bce.toFixed(1)} + KL ${now.kl.toFixed(1)} = ${total.toFixed(1)} nats, the negative ELBO. ` +
      `With the encoder's means: ${best.toFixed(1)}.`);
    yield* trace(before);
  }

  function* trace(before) {  // how far the loss is from the encoder's, as one latent moves
    const COUNT = 36, values = Array.from({ length: COUNT }, (_, i) => EXTENT * (2 * i / (COUNT - 1) - 1)), changes = [];
    for (const value of values) {
      const there = loss({ ...posterior, mu: posterior.mu.map((m, k) => k === latent ? value : m) });
      changes.push([there.bce + there.kl - before.bce - before.kl, there.bce - before.bce, there.kl - before.kl]);
      yield;
    }
    curves.forEach((curve, c) => curve.setAttribute("d", `M${changes.map((change, i) => `${100 * i / (COUNT - 1)} ${toY(change[c])}`).join("L")}`));
    [own, posterior].forEach(({ mu }, i) => lines[i].setAttribute("d", `M${50 + 50 * clamp(mu[latent]) / EXTENT} 0V100`));
    setText(byId("curve-text"), `What moving the mean of ${latentName(latent)} costs: the dotted line is where the encoder put it, and level lines are 40 nats apart`);
  }
  function start() {
    own = main.encode(input.pixels);
    posterior = { ...own, mu: own.mu.slice() };
    show("loss-image", input.pixels, input.name);
    refresh("loss", update());
  }

  byId("reset").onclick = start;
  input.listeners.push(start);
  start();
}

// ---------------------------------------------------------------------------------------------------------------------
// The page

function leaveOut(id) {
  byId(id).remove();
  document.querySelector(`nav a[href="#${id}"]`).remove();
}

document.title = data.title;
setText(byId("title"), data.title);
data.about.forEach(text => make("p", byId("about"), { textContent: text }));
Object.values(data.models).forEach(({ caption }) => make("p", byId("captions"), { textContent: caption }));

const maps = [startWalk()];
if (main.encode && map.encode) maps.push(startDraw());
else leaveOut("draw");
startMix();
startSample();
if (main.encode) startLoss();
else leaveOut("loss");
if (map.size === 2) refresh("manifold", drawManifold(maps.map(({ canvas }) => canvas)));
