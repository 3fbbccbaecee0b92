"""What most servers of this model are: FastAPI around a loop over transformers' `generate`, one request at a time.

    python benchmarks/serve_transformers.py --model DIR --port 8001

It answers greedily, `min_tokens` to `max_tokens` tokens, and knows of the protocol what serve_throughput.py asks.
"""

import argparse
import base64
import io
import threading
from typing import Any

import soundfile
import torch
import transformers
import uvicorn
from fastapi import Body, FastAPI


def make_app(folder: str) -> FastAPI:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
    app, turn = FastAPI(), threading.Lock()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/chat/completions")
    def chat(asked: dict[str, Any] = Body()) -> dict[str, Any]:  # noqa: B008
        sounds, messages = [], []
        for message in asked["messages"]:
            content: list[dict[str, Any]] = []
            for part in message["content"]:
                if part["type"] == "text":
                    content.append(part)
                else:
                    data = base64.b64decode(part["input_audio"]["data"])
                    sounds.append(soundfile.read(io.BytesIO(data), dtype="float32")[0])
                    content.append({"type": "audio", "audio_url": "sound"})
            messages.append({"role": message["role"], "content": content})
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=text, audio=sounds, sampling_rate=16_000, return_tensors="pt")
        with turn, torch.inference_mode():
            made = model.generate(
                **inputs, min_new_tokens=asked["min_tokens"], max_new_tokens=asked["max_tokens"], do_sample=False
            )
        new = made[:, inputs["input_ids"].shape[1] :]
        answer = processor.batch_decode(new, skip_special_tokens=True)[0]
        return {"choices": [{"message": {"role": "assistant", "content": answer}}]}

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, default=8001)
    arguments = parser.parse_args()
    uvicorn.run(make_app(arguments.model), port=arguments.port, log_level="warning")
