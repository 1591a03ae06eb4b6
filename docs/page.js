// What the page shows of the models, and what can be done with them. A section whose model is not there is left out.

const byId = id => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const [main, vamp, map = main] = ["main", "vamp", "map"].map(role => data.models[role] && readModel(data.models[role]));
const digits = readPictures(data.pictures, main), { classes, labels, height, width, images } = digits;
const EXTENT = 4;  // sliders and maps show latents from -EXTENT to EXTENT
const clamp = value => Math.max(-EXTENT, Math.min(EXTENT, value));
const latentName = latent => `z${[...String(latent + 1)].map(digit => "₀₁₂₃₄₅₆₇₈₉"[digit]).join("")}`;
const nameOf = ({ classes, labels }, i) => {
  return classes.length > 1 ? `an image of class ${classes[labels[i]]}` : `image ${i + 1} of ${classes[0]}`;
};
const signed = value => value.toFixed(2).replace("-0.00", "0.00").replace("-", "−");

function readPictures({ images, ...pictures }, model) {  // their posterior means are the first of the model's points
  const bytes = readBytes(images), size = pictures.height * pictures.width * pictures.channels;
  const toPixels = (_, i) => Float32Array.from(bytes.subarray(i * size, (i + 1) * size), byte => byte / 255);
  return { ...pictures, model, images: Array.from({ length: bytes.length / size }, toPixels) };
}

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

function setAttributes(element, attributes) {
  Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
}

function setText(element, text) {  // only where it changes, since screen readers may read it aloud
  if (element.textContent !== text) element.textContent = text;
}

function resize(canvas, columns, rows, { width, height } = digits) {  // to so many images, and empties it
  canvas.width = columns * width;
  canvas.height = rows * height;
}

function put(canvas, pixels, column = 0, row = 0, { width, height } = digits) {  // one image, among others
  const image = new ImageData(width, height), { data } = image, channels = pixels.length / (width * height);
  for (let i = 0; i < data.length; i++) {  // red, green, blue and opacity in turn
    data[i] = i % 4 === 3 ? 255 : 255 * pixels[channels * (i >> 2) + Math.min(i % 4, channels - 1)];
  }
  canvas.getContext("2d").putImageData(image, column * width, row * height);
}

function show(canvas, pixels, description, pictures = digits) {
  if (canvas.height !== pictures.height || canvas.width !== pictures.width) resize(canvas, 1, 1, pictures);
  put(canvas, pixels, 0, 0, pictures);
  canvas.ariaLabel = description;
}

function fillIn(template, id) {  // an element with a template's copy -> what finds an element by its class
  byId(id).append(byId(template).content.cloneNode(true));
  return name => document.querySelector(`#${id} .${name}`);
}

function makeSliders(box, model, onInput) {  // of all latents, those that say most first -> sliders by latent
  const sliders = [];
  for (const latent of model.order) {
    const label = make("label", box, { className: "slider" });
    label.append(latentName(latent));
    const slider = make("input", label, { type: "range", min: -EXTENT, max: EXTENT, step: 0.01 });
    slider.ariaLabel = `Latent ${latent + 1}`;
    slider.oninput = () => onInput(latent, Number(slider.value));
    make("span", label);
    sliders[latent] = slider;
  }
  return sliders;
}

function setSlider(slider, value, text = signed(value)) {  // and what is written beside it, which is no live region
  slider.value = value;
  slider.ariaValueText = text;
  setText(slider.nextElementSibling, text);
}

function onDrag(element, start, move) {  // of a finger or the main button; places are shares of the element's sides
  const place = event => {
    const box = element.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  element.addEventListener("pointerdown", event => {
    if (!event.isPrimary || event.button) return;
    element.setPointerCapture(event.pointerId);
    start(place(event), event.pointerType === "touch");
  });
  element.addEventListener("pointermove", event => {
    if (event.isPrimary && element.hasPointerCapture(event.pointerId)) move(place(event));
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The map: two latents of a model, with the posterior means of images as dots. In its SVG, a latent's unit is 100 long

const [across, up] = map.order;
const dots = map.points.slice(0, 500);
const stops = map.typical.map(i => ({ label: labels[i], mu: map.points[i] }));  // each class's label, and Fly's way
const onMap = mu => ({ x: 100 * mu[across], y: -100 * mu[up] });

function makeMap(box) {
  const canvas = make("canvas", box), size = 100 * EXTENT;
  const svg = makeSvg("svg", box, { viewBox: `${-size} ${-size} ${2 * size} ${2 * size}`, "aria-hidden": true });
  for (let value = 1 - EXTENT; value < EXTENT; value++) {
    const lines = `M${100 * value} ${-size}V${size}M${-size} ${100 * value}H${size}`;
    makeSvg("path", svg, { class: value ? "grid" : "axis", d: lines });
  }
  const group = makeSvg("g", svg, { class: "dots" });
  dots.map(onMap).forEach(({ x, y }, i) => {
    makeSvg("circle", group, { cx: x, cy: y, r: 5, fill: data.colors[labels[i]] });
  });
  if (stops.length <= 20) {
    stops.forEach(({ label, mu }) => { makeSvg("text", svg, onMap(mu)).textContent = classes[label]; });
  }
  return { canvas, svg, dots: group };
}

function* drawManifold(canvases, tiles = 24) {  // of a model of two latents, from the centre outwards
  const columns = Math.round(tiles * Math.sqrt(height / width)), rows = Math.round(tiles * Math.sqrt(width / height));
  canvases.forEach(canvas => resize(canvas, columns, rows));
  const places = Array.from({ length: rows * columns }, (_, i) => {
    const column = i % columns, row = Math.floor(i / columns);
    return { column, row, z: [(2 * column + 1) / columns - 1, 1 - (2 * row + 1) / rows].map(share => EXTENT * share) };
  });
  places.sort((a, b) => Math.hypot(...a.z) - Math.hypot(...b.z));
  for (const { column, row, z } of places) {
    const pixels = map.decode(z);
    canvases.forEach(canvas => put(canvas, pixels, column, row));
    yield;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Draw. The image at hand is a drawing, or one of the images in the page

const NOTHING = "nothing";  // the name of an input that is not there
const input = { pixels: images[0], name: "", listeners: [] };

function setInput(pixels, name) {
  Object.assign(input, { pixels, name });
  input.listeners.forEach(listener => listener());
}

function startPad() {  // -> what shows an image instead of a drawing
  const pad = byId("pad"), context = pad.getContext("2d");
  let strokes = [];
  pad.width = 600;
  pad.height = Math.round(600 * height / width);

  function clear() {
    strokes = [];
    context.fillRect(0, 0, pad.width, pad.height);
  }

  function extend([x, y]) {  // the stroke in progress
    const stroke = strokes.at(-1), lineWidth = 2 * PEN / 28 * Math.min(pad.width, pad.height);
    stroke.push([x, y * pad.height / pad.width]);
    Object.assign(context, { strokeStyle: "white", lineWidth, lineCap: "round" });
    context.beginPath();
    for (const [x, y] of [stroke.at(-2) ?? stroke[0], stroke.at(-1)]) context.lineTo(x * pad.width, y * pad.width);
    context.stroke();
    refresh("drawing", read());
  }

  function* read() {
    if (strokes.length) setInput(rasterize(strokes, height, width), "your drawing");  // or it was cleared meanwhile
  }

  onDrag(pad, place => {
    if (!strokes.length) clear();
    strokes.push([]);
    extend(place);
  }, extend);
  byId("clear").onclick = () => {
    clear();
    setInput(new Float32Array(height * width), NOTHING);
  };
  return i => {
    clear();
    const canvas = document.createElement("canvas");
    resize(canvas, 1, 1);
    put(canvas, images[i]);
    context.imageSmoothingEnabled = false;
    context.drawImage(canvas, 0, 0, pad.width, pad.height);
    setInput(images[i], nameOf(digits, i));
  };
}

function startDraw() {
  const showImage = startPad(), drawMap = makeMap(byId("draw-map"));
  const marker = makeSvg("g", drawMap.svg, { class: "place" }), cross = makeSvg("path", marker, { class: "cross" });
  const ellipses = [2, 1].map(sigmas => [sigmas, makeSvg("ellipse", marker, { class: "spread" })]);
  const bars = main.order.map(latent => {
    const bar = make("div", byId("posterior"), { className: "latent" });
    make("span", bar, { textContent: latentName(latent) });
    return bar;
  });
  const inWords = ({ mu, std }, latents) => {
    return latents.map(k => `${latentName(k)} ${signed(mu[k])} ± ${std[k].toFixed(2)}`).join(", ");
  };

  function showPlace({ mu, std }) {
    const { x, y } = onMap(mu), size = 100 * EXTENT;
    setAttributes(cross, { d: `M${x} ${-size}V${size}M${-size} ${y}H${size}` });
    ellipses.forEach(([n, ellipse]) => {
      setAttributes(ellipse, { cx: x, cy: y, rx: 100 * n * std[across], ry: 100 * n * std[up] });
    });
  }

  function showPosterior({ mu, std }) {
    main.order.forEach((k, i) => {
      bars[i].style.setProperty("--mu", clamp(mu[k]).toFixed(3));
      bars[i].style.setProperty("--std", std[k].toFixed(3));
    });
  }

  function* read() {
    const { pixels, name } = input;
    byId("draw").classList.toggle("empty", name === NOTHING);
    byId("pad").ariaLabel = `Drawing area, for mouse or finger. It shows ${name}`;
    show(byId("read"), pixels, `What the encoder reads: ${name}`);
    if (name === NOTHING) showNothing(pixels);
    else showAnswer(pixels, name);
  }

  function showNothing(blank) {  // although the encoder gives a blank image a posterior too
    show(byId("rebuilt"), blank, "No reconstruction: nothing is drawn");
    setText(byId("verdict"), "");
    byId("draw-map").ariaLabel = "Map without a place: nothing is drawn";
    byId("posterior").ariaLabel = "No posterior: nothing is drawn";
  }

  function showAnswer(pixels, name) {
    const posterior = main.encode(pixels), onTheMap = map.encode(pixels);
    show(byId("rebuilt"), main.decode(posterior.mu), `Reconstruction of ${name}`);
    setText(byId("verdict"), `Looks like ${classes[nearestClass(main.points, labels, posterior.mu)]}`);
    showPlace(onTheMap);
    showPosterior(posterior);
    byId("draw-map").ariaLabel = `Map with the place of ${name}: ${inWords(onTheMap, [across, up])}`;
    byId("posterior").ariaLabel = `Posterior of ${name}: ${inWords(posterior, main.order.slice(0, 5))}, and so on`;
  }

  let turn = 0;
  byId("next").onclick = () => showImage(turn = (turn + 1) % images.length);
  input.listeners.push(() => refresh("draw", read()));
  showImage(turn);
  return drawMap;
}

// ---------------------------------------------------------------------------------------------------------------------
// Erase

function startErase() {
  const COUNT = 6, STEPS = 60, ERASER = 2.5 / 28 * Math.min(height, width);  // half the eraser's width, in pixels
  const parts = {
    "Top half": i => i < height * width / 2,
    "Bottom half": i => i >= height * width / 2,
    "Left half": i => i % width < width / 2,
    "Right half": i => i % width >= width / 2,
    Nothing: () => false,
  };
  const canvases = Array.from({ length: COUNT }, () => make("canvas", byId("completions"), { role: "img" }));
  let erased, last, seed = 1;

  const yellow = value => [0.16 + 0.84 * value, 0.13 + 0.75 * value, 0.02 + 0.28 * value];
  const checked = i => yellow((i % width + Math.floor(i / width)) % 2 ? 0.3 : 0.1);
  const coloured = colour => Array.from(input.pixels, (value, i) => erased[i] ? colour(i) : [value, value, value]).flat();

  function erase(isErased) {
    erased = input.pixels.map((_, i) => isErased(i));
    start();
  }

  function rub(...places) {
    const toPixels = ([x, y]) => [x * width, y * height], before = erased;
    const rubbed = paint([places.map(toPixels)], height, width, ERASER);
    last = places.at(-1);
    erase(i => before[i] || rubbed[i] > 0.5);
  }

  function start() {
    const percent = Math.round(100 * sum(erased) / erased.length);
    const description = `Eraser, for mouse or finger. It shows ${input.name}, of which ${percent}% is erased`;
    show(byId("eraser"), coloured(checked), description);
    refresh("completions", fill());
  }

  function* fill() {
    const chains = canvases.map((_, i) => complete(main, input.pixels, erased, generator(COUNT * seed + i)));
    for (let step = 1; step <= STEPS; step++) {
      for (const [i, chain] of chains.entries()) {
        const { z, logits } = chain.next().value;
        if (step === 1 || step % 20 === 0) {  // a first answer, and better ones
          const description = `Completion ${i + 1}, like ${classes[nearestClass(main.points, labels, z)]}`;
          show(canvases[i], coloured(pixel => yellow(sigmoid(logits[pixel]))), description);
        }
        yield;
      }
    }
  }

  for (const [name, isErased] of Object.entries(parts)) {
    make("button", byId("parts"), { textContent: name }).onclick = () => erase(isErased);
  }
  byId("others").onclick = () => { seed++; start(); };
  onDrag(byId("eraser"), place => rub(place), place => rub(last, place));
  input.listeners.push(start);
  erase(parts["Top half"]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Walk

const walk = { z: new Float64Array(map.size), chosen: -1, sliders: [] };  // chosen: the dot that z is the mean of

function walkTo(z, chosen = -1) {
  Object.assign(walk, { z: Float64Array.from(z), chosen });
  refresh("walk", showWalk());
}

function walkBy(right, upwards) {
  walkTo(walk.z.map((value, k) => clamp(value + (k === across ? right : k === up ? upwards : 0))));
}

function* showWalk() {
  const { z, chosen, sliders, marker } = walk, { x, y } = onMap(z);
  const mean = chosen < 0 ? "" : `, the mean of ${nameOf(digits, chosen)}`;
  const where = `${latentName(across)} = ${signed(z[across])}, ${latentName(up)} = ${signed(z[up])}${mean}`;
  show(byId("walked"), map.decode(z), `Image decoded from ${where}`);
  setAttributes(marker, { cx: x, cy: y });
  setText(byId("walk-place"), where);
  byId("walk-map").ariaLabel = `Map, ${where}. Arrow keys move the point.`;
  sliders.forEach((slider, latent) => setSlider(slider, z[latent]));
}

function followPointer(box) {
  let pressed, onDot;
  const toLatents = ([x, y]) => [clamp(EXTENT * (2 * x - 1)), clamp(EXTENT * (1 - 2 * y))];
  const pixels = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]) * box.clientWidth / (2 * EXTENT);
  const follow = ([x, y]) => walkBy(x - walk.z[across], y - walk.z[up]);

  onDrag(box, (place, touch) => {
    fly(false);
    pressed = toLatents(place);
    const distances = dots.map(mu => pixels([mu[across], mu[up]], pressed));
    const nearest = distances.indexOf(Math.min(...distances));
    onDot = distances[nearest] < (touch ? 10 : 5);
    if (onDot) walkTo(dots[nearest], nearest);
    else follow(pressed);
  }, place => {
    onDot &&= pixels(toLatents(place), pressed) < 8;  // a hand that trembles does not drag yet
    if (!onDot) follow(toLatents(place));
  });
}

function followKeys(event) {
  const step = event.shiftKey ? 0.5 : 0.05;
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
  if (!way) return;
  event.preventDefault();
  fly(false);
  walkBy(step * way[0], step * way[1]);
}

function fly(on) {  // along a curve through all classes, and where motion is not wanted, from one to the next
  const means = stops.map(({ mu }) => mu);
  let before = null;
  function step(now) {
    walk.flown = (walk.flown ?? 0) + (before === null ? 0 : Math.min(now - before, 100) / 2000);  // in stops
    before = now;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    walkTo(closedPath(means, still ? Math.floor(walk.flown) : walk.flown));
    walk.flight = requestAnimationFrame(step);
  }
  cancelAnimationFrame(walk.flight);
  walk.flight = on ? requestAnimationFrame(step) : 0;
  setText(byId("fly"), on ? "Pause" : "Fly");
  byId("walk-place").ariaLive = on ? "off" : "polite";
  walk.route.style.display = on ? "" : "none";
}

function startWalk() {
  const box = byId("walk-map"), walkMap = makeMap(box), means = stops.map(({ mu }) => mu);
  const route = Array.from({ length: 40 * means.length }, (_, i) => onMap(closedPath(means, i / 40)));
  const curve = `M${route.map(({ x, y }) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L")}Z`;
  walk.route = makeSvg("path", walkMap.svg, { class: "route", d: curve });
  walk.marker = makeSvg("circle", walkMap.svg, { class: "marker", r: 14 });
  const stopAt = z => { fly(false); walkTo(z); };
  if (map.size > 2) {
    walk.sliders = makeSliders(byId("walk-sliders"), map, (latent, value) => stopAt(walk.z.with(latent, value)));
  }
  followPointer(box);
  box.addEventListener("keydown", followKeys);
  byId("fly").onclick = () => fly(!walk.flight);
  byId("jump").onclick = () => stopAt(map.drawPrior(Math.random)(1));
  byId("origin").onclick = () => stopAt(new Float64Array(map.size));
  byId("dots").onchange = () => { walkMap.dots.style.display = byId("dots").checked ? "" : "none"; };
  const axes = `Across is ${latentName(across)} and up is ${latentName(up)}, the two latents that say most`;
  setText(byId("walk-text"), (map.size === 2
    ? "A model of two latents has a map: each place on it decodes to an image."
    : `Each point of latent space decodes to an image. ${axes}; below are sliders for all.`) +
    " Dots are posterior means of images, in the colours of their classes.");
  classes.forEach((name, label) => {
    const item = make("li", byId("legend"));
    make("i", item).style.background = data.colors[label];
    item.append(name);
  });
  stopAt(walk.z);
  return walkMap;
}

// ---------------------------------------------------------------------------------------------------------------------
// Mix

function makeEnd(part, name, pictures, onChange) {  // one of two images -> what gives its pixels and latents
  const { model, images, labels, classes } = pictures, select = part(`${name}-class`);
  const drawing = { pixels: images[0], mu: model.points[0] };
  let turn = pictures.starts?.[name] ?? 0;
  [...new Set(labels.slice(0, images.length))].sort((a, b) => a - b)
    .forEach(label => make("option", select, { value: label, textContent: classes[label] }));
  if (model.encode) make("option", select, { value: "drawing", textContent: "drawing" });
  select.value = select.options[name === "from" ? 0 : Math.max(0, Math.min(8, select.length - 2))].value;
  select.hidden = select.length === 1;

  function change() {
    if (select.value === "drawing") Object.assign(drawing, { pixels: input.pixels, mu: model.encode(input.pixels).mu });
    onChange();
  }
  select.onchange = change;
  part(`${name}-next`).onclick = () => { turn++; change(); };

  return () => {
    const own = images.map((_, i) => i).filter(i => labels[i] === Number(select.value)), i = own[turn % own.length];
    const end = select.value === "drawing" ? drawing : { pixels: images[i], mu: model.points[i] };
    show(part(name), end.pixels, select.value === "drawing" ? "A drawing" : nameOf(pictures, i), pictures);
    return end;
  };
}

function startMix(id, pictures) {
  const STEPS = 11, part = fillIn("mixer", id), share = part("share"), { model } = pictures;
  const strips = [part("path-latents"), part("path-pixels")];
  const ends = ["from", "to"].map(name => makeEnd(part, name, pictures, () => refresh(`${id} path`, path())));
  strips.forEach(strip => resize(strip, STEPS, 1, pictures));

  function* path() {
    const [from, to] = ends.map(end => end());
    share.oninput = () => refresh(`${id} mixed`, mixed(from, to));
    share.oninput();
    for (let step = 0; step < STEPS; step++) {
      const t = step / (STEPS - 1);
      put(strips[0], model.decode(mix(from.mu, to.mu, t)), step, 0, pictures);
      put(strips[1], mix(from.pixels, to.pixels, t), step, 0, pictures);
      yield;
    }
  }

  function* mixed(from, to) {
    const t = Number(share.value), percent = `${Math.round(100 * t)}%`;
    const latents = `Decoded ${percent} of the way in latent space`, pixels = `Pixels blended, ${percent} of the way`;
    setSlider(share, t, percent);
    show(part("mixed-latents"), model.decode(mix(from.mu, to.mu, t)), latents, pictures);
    show(part("mixed-pixels"), mix(from.pixels, to.pixels, t), pixels, pictures);
  }

  refresh(`${id} path`, path());
}

// ---------------------------------------------------------------------------------------------------------------------
// Sample

function startSample(id, pictures, models) {  // models by the names of their priors
  const SIDE = 6, part = fillIn("sampler", id), temperature = part("temperature");
  const grids = Object.entries(models).map(([prior, model]) => {
    const figure = make("figure", part("grids")), canvas = make("canvas", figure);
    resize(canvas, SIDE, SIDE, pictures);
    canvas.setAttribute("role", "img");
    make("figcaption", figure, { textContent: `${prior}, ${model.size} latents` });
    return { model, prior, canvas };
  });

  function draw(random) {
    grids.forEach(grid => { grid.draws = Array.from({ length: SIDE * SIDE }, () => grid.model.drawPrior(random)); });
    decode();
  }

  function decode() {
    setSlider(temperature, temperature.value, Number(temperature.value).toFixed(2));
    grids.forEach(grid => refresh(`${id} of ${grid.prior}`, fill(grid)));
  }

  function* fill({ model, prior, canvas, draws }) {
    canvas.ariaLabel = `${draws.length} samples from the prior ${prior}, at temperature ${temperature.value}`;
    for (let i = 0; i < draws.length; i++) {
      put(canvas, model.decode(draws[i](Number(temperature.value))), i % SIDE, Math.floor(i / SIDE), pictures);
      yield;
    }
  }

  temperature.oninput = decode;
  part("again").onclick = () => draw(Math.random);
  draw(generator(0));
}

// ---------------------------------------------------------------------------------------------------------------------
// Loss

function makeLoss() {  // -> the negative ELBO and its terms, with the BCE's mean over fixed draws, for smooth curves
  const random = generator(1), noise = [0, 1].map(() => new Float64Array(main.size).map(() => normal(random)));
  const draws = [...noise, ...noise.map(eps => eps.map(value => -value))];
  return ({ mu, std, logvar }) => {
    const zs = draws.map(eps => mu.map((m, k) => m + std[k] * eps[k]));
    const bce = sum(zs.map(z => sum(bceByPixel(main.logits(z), input.pixels)))) / zs.length;
    const kl = sum(klByLatent({ mu, logvar }));
    return { bce, kl, total: bce + kl };
  };
}

function makeCurves() {  // -> what draws how the loss and its terms change along a latent
  const svg = byId("curve"), terms = ["total", "bce", "kl"];
  const toY = nats => Math.max(-5, Math.min(105, 80 - nats)).toFixed(2);
  for (const nats of [0, 40]) makeSvg("path", svg, { class: "level", d: `M0 ${toY(nats)}H100` });
  const curves = terms.map(name => makeSvg("path", svg, { class: name }));
  const lines = ["here", "own"].map(name => makeSvg("path", svg, { class: name }));
  return (changes, places) => {
    const at = i => 100 * i / (changes.length - 1);
    terms.forEach((term, c) => {
      curves[c].setAttribute("d", `M${changes.map((change, i) => `${at(i)} ${toY(change[term])}`).join("L")}`);
    });
    places.forEach((value, i) => lines[i].setAttribute("d", `M${50 + 50 * clamp(value) / EXTENT} 0V100`));
  };
}

function startLoss() {
  const COUNT = 37, STEPS = 13, loss = makeLoss(), drawCurves = makeCurves();
  let own, posterior, latent = main.order[0];  // the encoder's posterior, that of the sliders, and the one in the chart
  const sliders = makeSliders(byId("loss-sliders"), main, (k, value) => choose(k, posterior.mu[k] = value));
  sliders.forEach((slider, k) => { slider.onfocus = () => choose(k); });

  function choose(k) {
    latent = k;
    refresh("loss", update());
  }

  function* update() {
    const { mu } = posterior, kl = klByLatent(posterior), logits = main.logits(mu);
    const byPixel = bceByPixel(logits, input.pixels).map(nats => Math.min(1, nats / 3));
    show(byId("loss-rebuilt"), logits.map(sigmoid), "Reconstruction from the sliders' means");
    show(byId("loss-pixels"), byPixel, "BCE by pixel: white is 3 nats or more");
    sliders.forEach((slider, k) => setSlider(slider, mu[k], `${signed(mu[k])}, KL ${kl[k].toFixed(2)}`));
    yield;
    const now = loss(posterior), changes = [];
    yield;
    const before = loss(own);
    setText(byId("nats"), `BCE ${now.bce.toFixed(1)} + KL ${now.kl.toFixed(1)} = ${now.total.toFixed(1)} nats, the ` +
      `negative ELBO. With the encoder's means: ${before.total.toFixed(1)}.`);
    for (let i = 0; i < COUNT; i++) {
      const there = loss({ ...posterior, mu: mu.with(latent, EXTENT * (2 * i / (COUNT - 1) - 1)) });
      changes.push({ total: there.total - before.total, bce: there.bce - before.bce, kl: there.kl - before.kl });
      yield;
    }
    drawCurves(changes, [mu[latent], own.mu[latent]]);
    for (let i = 0; i < STEPS; i++) {
      put(byId("traversal"), main.decode(mu.with(latent, 3 * (2 * i / (STEPS - 1) - 1))), i);
      yield;
    }
    setText(byId("curve-text"), `What moving the mean of ${latentName(latent)} costs. The dotted line is where the ` +
      "encoder put it, and the solid line where it is now. Level lines are 40 nats apart.");
    setText(byId("traversal-text"), `What ${latentName(latent)} draws, from −3 to 3 standard deviations of the prior.`);
  }

  function start() {
    own = main.encode(input.pixels);
    posterior = { ...own, mu: own.mu.slice() };
    show(byId("loss-image"), input.pixels, input.name);
    refresh("loss", update());
  }

  resize(byId("traversal"), STEPS, 1);
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
data.notes.forEach(text => make("p", byId("notes"), { textContent: text }));

const maps = [startWalk()];
if (main.encode && map.encode) maps.push(startDraw());
else leaveOut("draw");
startMix("mix", digits);
setText(byId("sample-text"), "A draw of the prior, decoded, is an image that never was. " +
  (vamp ? "Left, the prior is the standard normal; right, the VampPrior, a learned mixture of posteriors. " : "") +
  "The temperature is how far draws spread: low, to what is likely; high, to where the decoder has never been.");
startSample("sample", digits, vamp ? { "N(0, I)": main, VampPrior: vamp } : { "N(0, I)": main });
if (main.encode) [startErase, startLoss].forEach(start => start());
else ["erase", "loss"].forEach(leaveOut);
if (data.emoji) {
  new IntersectionObserver((changes, observer) => {  // starts when almost in view, since it is slow
    if (!changes.some(({ isIntersecting }) => isIntersecting)) return;  // a slow browser reports several at once
    observer.disconnect();
    const { model: content, pictures } = data.emoji, model = readModel(content), emoji = readPictures(pictures, model);
    const drawPrior = readPrior(model.size, { mu: content.points, std: content.stds });
    startMix("mix-emoji", emoji);
    startSample("sample-emoji", emoji, { "The prior, a flow": model, "Posteriors of these emoji": { ...model, drawPrior } });
  }, { rootMargin: "50%" }).observe(byId("emoji"));
} else leaveOut("emoji");
if (map.size === 2) refresh("manifold", drawManifold(maps.map(({ canvas }) => canvas)));
