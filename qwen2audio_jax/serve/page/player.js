// A player: play and pause, the waveform of the clip, and a place in it.

const BAR = 3, GAP = 2;

/** The element of a clip's player. */
export function player(clip) {
  const element = document.getElementById("player").content.firstElementChild.cloneNode(true);
  const [play, canvas, place, audio] = ["button", "canvas", "input", "audio"].map((name) => element.querySelector(name));
  const called = clip.name || "recording";
  audio.src = clip.address ??= URL.createObjectURL(clip.blob);
  element.querySelector(".name").textContent = clip.name;
  element.querySelector(".seconds").textContent = clip.seconds ? clock(clip.seconds) : "";
  place.setAttribute("aria-label", `Position in ${called}`);
  const show = () => {
    const playing = !audio.paused;
    element.classList.toggle("playing", playing);
    play.setAttribute("aria-label", `${playing ? "Pause" : "Play"} ${called}`);
  };
  const move = () => {
    const share = audio.duration ? audio.currentTime / audio.duration : 0;
    place.value = 1000 * share;
    place.setAttribute("aria-valuetext", clock(audio.currentTime));
    draw(canvas, clip.samples, share);
    if (!audio.paused) requestAnimationFrame(move);
  };
  play.onclick = () => (audio.paused ? audio.play().catch(() => {}) : audio.pause());
  audio.onplay = audio.onpause = audio.onended = () => {
    show();
    move();
  };
  audio.onerror = () => {
    play.disabled = true; // a format that the server may know and this browser does not
    play.setAttribute("aria-label", `${called} cannot be played by this browser`);
  };
  place.oninput = () => {
    if (audio.duration) audio.currentTime = (place.value / 1000) * audio.duration;
    move();
  };
  new ResizeObserver(move).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", move);
  show();
  return element;
}

export function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}.${Math.floor((seconds * 10) % 10)}`;
}

function draw(canvas, samples, share) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const dots = devicePixelRatio;
  canvas.width = width * dots;
  canvas.height = height * dots;
  const brush = canvas.getContext("2d");
  const colour = (name) => getComputedStyle(canvas).getPropertyValue(name);
  const bars = Math.floor(width / (BAR + GAP));
  const heights = samples ? peaks(samples, bars) : new Array(bars).fill(0);
  const most = Math.max(0.02, ...heights);
  brush.scale(dots, dots);
  heights.forEach((peak, index) => {
    const tall = Math.max(2, (peak / most) * (height - 4));
    brush.fillStyle = colour((index + 0.5) / bars < share ? "--accent" : "--rest");
    brush.fillRect(index * (BAR + GAP), (height - tall) / 2, BAR, tall);
  });
}

function peaks(samples, bars) {
  const size = samples.length / bars;
  return Array.from({ length: bars }, (_, bar) => {
    let peak = 0;
    for (let place = Math.floor(bar * size); place < (bar + 1) * size; place++) peak = Math.max(peak, Math.abs(samples[place] ?? 0));
    return peak;
  });
}
