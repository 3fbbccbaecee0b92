// Runs in the browser's audio thread: hands on what the microphone hears, as it is.

class Capture extends AudioWorkletProcessor {
  process([input]) {
    if (input[0]) this.port.postMessage(input[0].slice());
    return true;
  }
}

registerProcessor("capture", Capture);
