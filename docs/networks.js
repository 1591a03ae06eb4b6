"use strict";

// The networks of model.py, its losses, and MNIST's normalization of a drawing. Nothing here touches the page.

// ---------------------------------------------------------------------------------------------------------------------
// Matrices, which stand in the page as rows of whole numbers of 8 or 16 bits with a scale per row

function readBytes(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

const readFloats = base64 => new Float32Array(readBytes(base64).buffer);

function readMatrix({ bits, scales, values }) {  // -> its rows, each a Float32Array
  const { buffer } = readBytes(values), whole = bits === 8 ? new Int8Array(buffer) : new Int16Array(buffer);
  const rows = readFloats(scales), size = whole.length / rows.length;
  return Array.from(rows, (scale, row) => {
    const floats = new Float32Array(size);
    for (let i = 0, j = row * size; i < size; i++, j++) floats[i] = scale * whole[j];
    return floats;
  });
}

const readLayer = ({ weight, bias, ...rest }) => ({ weight: readMatrix(weight), bias: readFloats(bias), ...rest });

// ---------------------------------------------------------------------------------------------------------------------
// Layers. A weight holds a row for each input

const sigmoid = x => 1 / (1 + Math.exp(-x));
const softplus = x => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));
const activations = { relu: x => Math.max(x, 0), tanh: Math.tanh, silu: x => x * sigmoid(x) };

function linear({ weight, bias }, x) {
  const y = Float64Array.from(bias), rows = [], by = [];
  for (let j = 0; j < x.length; j++) if (x[j] !== 0) rows.push(weight[j]), by.push(x[j]);  // most pixels are 0
  while (rows.length % 4) rows.push(weight[0]), by.push(0);
  for (let k = 0; k < rows.length; k += 4) {  // four at a time, so that y is read and written a quarter as often
    const p = rows[k], q = rows[k + 1], r = rows[k + 2], s = rows[k + 3];
    const a = by[k], b = by[k + 1], c = by[k + 2], d = by[k + 3];
    for (let i = 0; i < y.length; i++) y[i] += a * p[i] + b * q[i] + c * r[i] + d * s[i];
  }
  return y;
}

// A picture is { rows, columns, values }, with a pixel's channels side by side. In a convolution with a padding of 1,
// and in a transposed one, each pixel adds to the pixels around its place
function convolve({ weight, bias, kernel, stride }, { rows, columns, values }) {
  const inputs = weight.length, outputs = bias.length, noBias = new Float64Array(weight[0].length);
  const picture = { rows: stride * rows, columns: stride * columns };
  picture.values = new Float64Array(picture.rows * picture.columns * outputs).map((_, i) => bias[i % outputs]);
  for (let pixel = 0; pixel < rows * columns; pixel++) {
    const added = linear({ weight, bias: noBias }, values.subarray(pixel * inputs, (pixel + 1) * inputs));
    const top = stride * Math.floor(pixel / columns) - 1, left = stride * (pixel % columns) - 1;
    for (let tap = 0; tap < kernel * kernel; tap++) {
      const row = top + Math.floor(tap / kernel), column = left + tap % kernel;
      if (row < 0 || row >= picture.rows || column < 0 || column >= picture.columns) continue;
      const from = tap * outputs, to = (row * picture.columns + column) * outputs;
      for (let k = 0; k < outputs; k++) picture.values[to + k] += added[from + k];
    }
  }
  return picture;
}

// ---------------------------------------------------------------------------------------------------------------------
// The model

function readFullyConnected(layers, activate) {  // -> the network's function
  const hiddenLayers = layers.map(readLayer), outputLayer = hiddenLayers.pop();
  return x => linear(outputLayer, hiddenLayers.reduce((h, layer) => linear(layer, h).map(activate), x));
}

function readConvolutional({ input, rows, columns, layers }, activate) {  // experiments/convolutional.py's decoder
  const inputLayer = readLayer(input), activated = ({ values, ...size }) => ({ ...size, values: values.map(activate) });
  const steps = layers.map(({ block, activation, ...only }) => {
    if (activation) return activated;
    const [layer, second] = (block ?? [only]).map(readLayer);
    if (!block) return picture => convolve(layer, picture);
    return picture => {
      const { values, ...size } = convolve(second, activated(convolve(layer, activated(picture))));
      return { ...size, values: values.map((value, i) => value + picture.values[i]) };
    };
  });
  return z => steps.reduce((picture, step) => step(picture), { rows, columns, values: linear(inputLayer, z) }).values;
}

function readFlow(couplings, size) {  // -> the function from a draw of N(0, I) to z: experiments/flow_prior.py's invert
  const networks = couplings.map(layers => readFullyConnected(layers, activations.silu)).reverse();
  const half = Math.floor(size / 2), others = size - half;
  return eps => networks.reduce((z, network) => {
    const change = network(z.slice(others));  // the logarithms of scales, and then shifts
    const unmoved = (value, i) => (value - change[others + i]) * Math.exp(-Math.tanh(change[i]));
    const moved = z.map((value, i) => i < others ? unmoved(value, i) : value);
    return moved.map((_, i) => moved[(i + half) % size]);
  }, eps);
}

function logisticMean(logit, scale) {  // of the discretized logistic, one of model.py's likelihoods
  const loc = 0.5 + 0.25 * logit;
  return Math.max(0, Math.min(1, scale * (softplus(loc / scale) - softplus((loc - 1) / scale))));
}

function readModel({ size, order, activation, encoder, mu, logvar, decoder, scales, prior, flow, points, typical }) {
  const activate = activations[activation], model = { size, order, points: points && readMatrix(points), typical };
  const byChannel = scales && readFloats(scales), channels = byChannel?.length;
  const outputs = 2 * channels + channels * (channels - 1) / 2;  // of a pixel: locations, scales, and weights of colours
  model.logits = (decoder.layers ? readConvolutional : readFullyConnected)(decoder, activate);
  model.decode = z => {
    const logits = model.logits(z);
    if (!byChannel) return logits.map(sigmoid);
    return new Float64Array(logits.length * channels / outputs).map((_, i) => {
      const k = i % channels, place = outputs * (i - k) / channels + k;
      return logisticMean(logits[place], byChannel[k] * Math.exp(logits[place + channels]));
    });
  };

  if (encoder) {
    const encoderLayers = encoder.map(readLayer), [muLayer, logvarLayer] = [mu, logvar].map(readLayer);
    model.encode = x => {
      const h = encoderLayers.reduce((h, layer) => linear(layer, h).map(activate), x), logvar = linear(logvarLayer, h);
      return { mu: linear(muLayer, h), logvar, std: logvar.map(value => Math.exp(0.5 * value)) };
    };
  }

  const drawPrior = readPrior(size, prior), bend = flow ? readFlow(flow, size) : eps => eps;
  model.drawPrior = random => {
    const draw = drawPrior(random);
    return temperature => bend(draw(temperature));
  };
  return model;
}

function readPrior(size, mixture) {  // -> its draws, spread `temperature` times as far: of N(0, I), or of a mixture
  const components = mixture && { mu: readMatrix(mixture.mu), std: readMatrix(mixture.std) };
  return random => {
    const k = components && Math.floor(random() * components.mu.length);
    const eps = new Float64Array(size).map(() => normal(random));
    const [mean, std] = components ? [components.mu[k], components.std[k]] : [eps.map(() => 0), eps.map(() => 1)];
    return temperature => eps.map((value, i) => mean[i] + temperature * std[i] * value);
  };
}

// ---------------------------------------------------------------------------------------------------------------------
// The loss's two terms, in nats, and draws

const bceByPixel = (logits, x) => logits.map((l, i) => softplus(l) - l * x[i]);
const klByLatent = ({ mu, logvar }) => mu.map((m, i) => -0.5 * (1 + logvar[i] - m * m - Math.exp(logvar[i])));
const sum = values => values.reduce((a, b) => a + b, 0);

function generator(seed) {  // uniform in [0, 1), the same for a seed in every browser: mulberry32
  return () => {
    seed = seed + 0x6d2b79f5 | 0;
    let t = Math.imul(seed ^ seed >>> 15, 1 | seed);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) / 2 ** 32;
  };
}

function normal(random) {  // Box-Muller
  return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
}

// ---------------------------------------------------------------------------------------------------------------------
// Completions of an image with erased pixels: Metropolis-within-Gibbs (Mattei & Frellsen 2018, arXiv 1802.04826)

const WARMUP = 20;  // steps that accept every proposal, which finds images like the seen part sooner

function logWeight({ z, logits }, x, { mu, std }) {  // log p(x|z) + log p(z) - log q(z|x), but for a constant
  const byLatent = z.map((value, k) => ((value - mu[k]) / std[k]) ** 2 - value * value);
  return 0.5 * sum(byLatent) - sum(bceByPixel(logits, x));
}

function* complete(model, pixels, erased, random) {  // -> z and its logits after each step, without end
  const decoded = z => ({ z, logits: model.logits(z) }), seen = pixels.map(value => value > 0.5);
  let state = decoded(model.drawPrior(random)(1));
  for (let step = 0; ; step++) {
    const x = seen.map((value, i) => erased[i] ? random() < sigmoid(state.logits[i]) : value), q = model.encode(x);
    const proposal = decoded(q.mu.map((mean, k) => mean + q.std[k] * normal(random)));
    const logRatio = () => logWeight(proposal, x, q) - logWeight(state, x, q);
    if (step < WARMUP || Math.log(random()) < logRatio()) state = proposal;
    yield state;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Points of the latent space

const mix = (a, b, t) => Float64Array.from(a, (value, i) => value + t * (b[i] - value));

function squaredDistance(a, b) {
  let total = 0;
  for (let i = 0; i < a.length; i++) total += (a[i] - b[i]) ** 2;
  return total;
}

function nearestClass(points, labels, z, count = 5) {  // by vote of the nearest points; the nearest decides a tie
  const distances = points.map(point => squaredDistance(point, z)), votes = [];
  while (votes.length < Math.min(count, points.length)) {
    const nearest = distances.reduce((best, distance, i) => distance < distances[best] ? i : best, 0);
    votes.push(labels[nearest]);
    distances[nearest] = Infinity;
  }
  const number = label => votes.filter(other => other === label).length;
  return votes.reduce((best, label) => number(label) > number(best) ? label : best);
}

function closedPath(stops, t) {  // a Catmull-Rom curve through all stops and back, which is at stops[i] for t = i
  const i = Math.floor(t), s = t - i;
  const [a, b, c, d] = [-1, 0, 1, 2].map(k => stops[(i + k + stops.length) % stops.length]);
  return Float64Array.from(b, (_, k) => {
    const cubic = 3 * (b[k] - c[k]) + d[k] - a[k], square = 2 * a[k] - 5 * b[k] + 4 * c[k] - d[k];
    return b[k] + 0.5 * s * (c[k] - a[k] + s * (square + s * cubic));
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// A drawing as MNIST has its digits: they fill a box of 20 of 28 pixels, and their centre of mass is the image's centre

const PEN = 1.3;  // half the width of a line, in pixels of 28, which gives as much ink as MNIST's digits have

function rasterize(strokes, height, width) {  // strokes: lists of [x, y], in shares of the canvas's width -> pixels
  const points = strokes.flat(), unit = Math.min(height, width) / 28, pen = PEN * unit;
  if (!points.length) return new Float32Array(height * width);
  const [xs, ys] = [0, 1].map(axis => points.map(point => point[axis]));
  const left = Math.min(...xs), top = Math.min(...ys);
  const extent = Math.max(Math.max(...xs) - left, Math.max(...ys) - top, 0.1);  // of a dot, not to blow up a tremble
  const scale = (20 * unit - 2 * pen) / extent;
  const paintAt = (dx, dy) => {
    const toPixels = ([x, y]) => [scale * (x - left) + dx, scale * (y - top) + dy];
    return paint(strokes.map(stroke => stroke.map(toPixels)), height, width, pen);
  };
  const [x, y] = centreOfMass(paintAt(4 * unit, 4 * unit), width);
  return paintAt(4 * unit + width / 2 - x, 4 * unit + height / 2 - y);
}

function centreOfMass(pixels, width) {
  const mass = sum(pixels);
  return [i => i % width, i => Math.floor(i / width)]
    .map(place => pixels.reduce((total, value, i) => total + value * (place(i) + 0.5), 0) / mass);
}

function paint(strokes, height, width, pen) {  // lines with round ends; a pixel's value is about its covered share
  const pixels = new Float32Array(height * width), reach = pen + 0.5;
  const from = (a, b) => Math.max(0, Math.floor(Math.min(a, b) - reach));
  const to = (a, b, size) => Math.min(size, Math.max(a, b) + reach);
  const segments = strokes.flatMap(stroke => stroke.map((point, i) => [stroke[Math.max(0, i - 1)], point]));
  for (const [[ax, ay], [bx, by]] of segments) {
    const dx = bx - ax, dy = by - ay, squaredLength = dx * dx + dy * dy;
    for (let row = from(ay, by); row < to(ay, by, height); row++) {
      for (let column = from(ax, bx); column < to(ax, bx, width); column++) {
        const px = column + 0.5 - ax, py = row + 0.5 - ay, i = row * width + column;
        const share = squaredLength ? Math.max(0, Math.min(1, (px * dx + py * dy) / squaredLength)) : 0;
        pixels[i] = Math.max(pixels[i], Math.min(1, reach - Math.hypot(px - share * dx, py - share * dy)));
      }
    }
  }
  return pixels;
}
