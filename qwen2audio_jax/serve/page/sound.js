// Sounds: recorded, decoded, written as WAV.

const RATE = 16000;

/** A recording that has begun: `stop()` gives its samples at 16 kHz, `drop()` forgets them. */
export async function record(onLevel) {
  if (!navigator.mediaDevices) throw new Error("Browsers give the microphone only to pages of https or of localhost.");
  const stream = await navigator.mediaDevices
    .getUserMedia({ audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false } })
    .catch((error) => {
      const refused = error.name === "NotAllowedError";
      throw new Error(refused ? "The microphone is not allowed: allow it in the browser's settings for this page." : "There is no microphone.");
    });
  const context = new AudioContext();
  const blocks = [];
  try {
    await context.audioWorklet.addModule("capture.js");
    const capture = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 });
    capture.port.onmessage = ({ data }) => {
      blocks.push(data);
      onLevel(Math.max(...data.map(Math.abs)));
    };
    context.createMediaStreamSource(stream).connect(capture);
    await context.resume();
  } catch (error) {
    end();
    throw error;
  }
  function end() {
    for (const track of stream.getTracks()) track.stop();
    context.close();
  }
  return {
    drop: end,
    async stop() {
      const rate = context.sampleRate;
      end();
      return resampled(joined(blocks), rate);
    },
  };
}

function joined(blocks) {
  const samples = new Float32Array(blocks.reduce((sum, block) => sum + block.length, 0));
  let place = 0;
  for (const block of blocks) {
    samples.set(block, place);
    place += block.length;
  }
  return samples;
}

async function resampled(samples, rate) {
  if (!samples.length) return samples;
  const context = new OfflineAudioContext(1, Math.ceil((samples.length * RATE) / rate), RATE);
  const buffer = context.createBuffer(1, samples.length, rate);
  buffer.copyToChannel(samples, 0);
  const source = new AudioBufferSourceNode(context, { buffer });
  source.connect(context.destination);
  source.start();
  return (await context.startRendering()).getChannelData(0);
}

/** A clip of recorded samples. */
export function recorded(samples) {
  return asClip(new Blob([wav(samples)], { type: "audio/wav" }), "", "wav", samples);
}

/** A clip of a file, sent as it is; one that the browser cannot decode has no waveform. */
export async function fromFile(file) {
  let samples = null;
  try {
    const decoded = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await file.arrayBuffer());
    samples = decoded.getChannelData(0);
  } catch {
    // The server knows more formats than browsers do.
  }
  return asClip(file, file.name, file.name.split(".").pop().toLowerCase(), samples);
}

async function asClip(blob, name, format, samples) {
  return { blob, name, format, samples, seconds: samples && samples.length / RATE, data: await base64(blob) };
}

function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error("The file cannot be read."));
    reader.readAsDataURL(blob);
  });
}

/** 16-bit WAV, mono. */
function wav(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (place, letters) => [...letters].forEach((letter, index) => view.setUint8(place + index, letter.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, index) => {
    view.setInt16(44 + 2 * index, Math.round(Math.max(-1, Math.min(1, sample)) * 32767), true);
  });
  return view.buffer;
}
