"""Load for a server: clients that send one image after the other, and what they got.

python load.py http://127.0.0.1:8000 photos/*.jpg --clients 32 --seconds 30
"""

import argparse
import http.client
import json
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Sends images to a server and measures its answers; times are in milliseconds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("server")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--clients", type=int, default=32, help="that ask at a time")
    parser.add_argument("--seconds", type=float, default=30, help="of load")
    given = parser.parse_args()
    contents = [path.read_bytes() for path in given.images]
    seconds: list[float] = []
    states: Counter[int | str] = Counter()
    end = time.monotonic() + given.seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(given.server).netloc, timeout=120)
        while (began := time.monotonic()) < end:
            number += given.clients
            try:
                connection.request("POST", "/predict", contents[number % len(contents)])
                answer = connection.getresponse()
                answer.read()
            except (OSError, http.client.HTTPException) as error:
                connection.close()  # the next request opens it again
                states[type(error).__name__] += 1
                time.sleep(0.1)
                continue
            seconds.append(time.monotonic() - began)
            states[answer.status] += 1

    began = time.monotonic()
    clients = [threading.Thread(target=client, args=(number,)) for number in range(given.clients)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    if not seconds:
        raise SystemExit(f"error: no answer from {given.server} ({', '.join(map(str, states))}): is the server up?")
    took, ordered = time.monotonic() - began, sorted(seconds)
    rate = states[200] / took
    milliseconds = {
        f"p{percent}_ms": round(1000 * ordered[int(percent / 100 * (len(ordered) - 1))]) for percent in (50, 99)
    }
    print(json.dumps(dict(clients=given.clients, per_second=round(rate, 1), **milliseconds, answers=dict(states))))


if __name__ == "__main__":
    main()
