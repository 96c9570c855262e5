"""A language model writes the sentences that CoMC (lang_cls.py) trains on.

    python tools/generate_texts.py texts.jsonl --labels "owl, ice cream, traffic light" \\
        --url http://localhost:11434/v1 --model NAME --count 5000
    python lang_cls.py --labels "owl, ice cream, traffic light" --texts texts.jsonl

Every request names one to five labels drawn at random, as Liu et al. (ICML 2024) do; the server is
any that speaks OpenAI's chat protocol, its key is read from OPENAI_API_KEY. Every sentence is kept
at once, {"request", "labels", "description"} a line; the same command asks for the missing ones.
"""
import argparse
import http.client
import json
import os
import random
import re
import socket
import ssl
import sys
import threading
import urllib.error
import urllib.request
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from data import UserError  # noqa: E402

WAITS = (0, 1, 4, 15, 60)  # seconds before each attempt: there are limits a minute
TIMEOUT = 300  # seconds: reasoning takes long
PASSES = (408, 409, 425, 429)  # HTTP's codes below 500 of what may pass
HOPELESS = (ConnectionRefusedError, socket.gaierror, ssl.SSLCertVerificationError,
            http.client.InvalidURL)  # to try again
ANSWERS = 4  # to a request, until one of them is a sentence


def ask(url, model, labels, stop):
    """-> a language model's answer about these labels and why it ended, "stop", "length", ...;
    ("", None) once stop, an event, is set. What may pass, as time-outs and broken connections, is
    tried again; then, and at once for other failures: UserError in the server's words."""
    prompt = (f"Describe, in one sentence of at most 25 words, a photo that shows: "
              f"{', '.join(labels)}. Use each of these names as it is written here and mention no "
              f"other object. Answer with the sentence only.")
    body = {"model": model, "messages": [{"role": "user", "content": prompt}]}
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions",
                                     json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
    if key:  # unredirected: another host must not get it
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    words, retry_after = "", 0  # of the server
    for wait in WAITS:
        if stop.wait(max(wait, retry_after)):
            return "", None
        retry_after = 0
        try:
            try:
                response = urllib.request.urlopen(request, timeout=TIMEOUT)
            except urllib.error.HTTPError as error:
                response = error  # with the server's words as its body
            with response:
                status, content = response.status, response.read().decode(errors="replace")
            words = f"HTTP {status} {response.reason}: {content}"
            if response.headers.get("Retry-After", "").isdigit():
                retry_after = min(int(response.headers["Retry-After"]), 600)
            if status == 200:
                choice = json.loads(content)["choices"][0]
                answer = choice["message"].get("content") or ""
                if isinstance(answer, list):  # of parts, some of which are reasoning
                    answer = "".join(part["text"] for part in answer if part["type"] == "text")
                return answer, choice.get("finish_reason")
        except (OSError, http.client.HTTPException) as error:
            words, status = f"{type(error).__name__}: {error}", 503
            if isinstance(getattr(error, "reason", error), HOPELESS):
                break
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # no answer
            words = words or str(error)  # of a key that cannot be sent
            # some say 200 and have the error's code in the body
            status = int((re.findall(r'"code": *"?(\d{3})\b', words) or [200])[0])
        if status < 500 and status not in PASSES:
            break
    words = " ".join(words.split())
    words = words.replace(key, "***") if key else words
    raise UserError(f"{url}: {words[:300]}; the same command goes on from what has come so far")


def missing_requests(path, labels, args):
    """{request: the labels it names} of those of --count for which the file has no sentence."""
    draw = random.Random(args.seed)
    missing = {request: draw.sample(labels, draw.randint(1, min(5, len(labels))))
               for request in range(args.count)}
    if os.path.exists(path):
        text = data.read_text(path)
        if text and not text.startswith('{"request": '):
            raise UserError(f"{path}: not written by this program: choose another file")
        lines = text[:text.rfind("\n") + 1]
        if lines != text:  # a kill or a full disk has cut the last one
            data.write_file(path, lines)
        for where, entry in data.read_json(path):
            if missing.pop(entry.get("request"), entry.get("labels")) != entry.get("labels"):
                raise UserError(f"{where}: for other labels or another seed: choose another file")
    return missing


def generate(path, labels, args):
    """Have --count sentences written about 1 to 5 random labels each, --requests at a time.

    UserError if the server fails, or if none of the first ten requests gets a sentence; what has
    come before, or is under way when the server fails, is kept."""
    missing, stop = missing_requests(path, labels, args), threading.Event()
    kept = args.count - len(missing)  # sentences of earlier calls

    def work(item):
        """One request: -> None, or what there is instead of a sentence."""
        request, named = item
        for _ in range(ANSWERS):
            if stop.is_set():
                return None
            try:
                answer, end = ask(args.url, args.model, named, stop)
            except UserError as error:
                stop.set()
                return error
            sentence = "" if end in ("length", "content_filter") else data.clean_sentence(answer)
            if sentence:  # unbuffered, a line is one write: it is there whole, and at once
                line = {"request": request, "labels": named, "description": sentence}
                file.write(json.dumps(line).encode() + b"\n")
                return None
        return f"{', '.join(named)}: {answer[:100]!r} ({end})"

    errors, failed = [], []
    # the pool's threads are daemons: Ctrl-C does not wait for what they have asked
    with open(path, "ab", buffering=0) as file, ThreadPool(args.requests) as pool:
        results = pool.imap_unordered(work, missing.items())
        bar = tqdm(results, total=len(missing), disable=args.quiet or None)
        for number, result in enumerate(bar, 1):
            if isinstance(result, UserError):
                errors.append(result)
            elif result:
                failed.append(result)
            if len(failed) == number + kept == 10:
                break
    if errors:
        raise errors[0]
    if failed:
        message = (f"requests without a sentence in {ANSWERS} answers: {len(failed):,}, the last "
                   f"about {failed[-1]}; the same command asks again")
        if len(failed) == number + kept:
            raise UserError(message)
        print(message, file=sys.stderr)
    print(f"{args.count - len(failed):,} sentences; train with --texts {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(usage="generate_texts.py FILE [options]", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", metavar="FILE", help="JSON lines; what it holds is not asked for again")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--labels", help='"owl, ice cream", or a file, a label a line')
    what.add_argument("--data", choices=list(data.DATASETS), help="the labels of this dataset")
    add("--root", metavar="DIR", help="its folder")
    add("--url", required=True, help="an OpenAI-compatible server's: http://localhost:11434/v1")
    add("--model", required=True, metavar="NAME", help="the server's name of the language model")
    add("--count", type=data.at_least(1), default=40_000, help="sentences (40,000)")
    add("--requests", type=data.at_least(1), default=8, help="at a time (8)")
    add("--seed", type=int, default=0, help="of the labels that are drawn (0)")
    add("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.root and not args.data:
        parser.error("--root is the folder of --data")
    if not args.url.startswith(("http://", "https://")):
        parser.error("--url starts with http:// or https://")
    if args.labels is not None:
        labels = data.read_labels(args.labels)
    else:
        labels = data.load_dataset(args.data, args.root, "test", limit=1, allow_missing=True).labels
    try:
        generate(args.file, labels, args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; the same command goes on") from None


if __name__ == "__main__":
    data.run(main)
