"""Clients of benchmarks/serving.py, in a process of their own so that they do not share the server's interpreter.

  python -m benchmarks.serving_client PLAN.json RESULT.json

A plan is {"port", "lanes": [[{"body", "wait", "leave"}]]}: each lane sends its requests one after the other over one
connection. "leave" is the number of seconds after which the client closes the connection without an answer.
The result has, for each request, the status, the body and the seconds.
"""

import asyncio
import json
import sys
import time

HEAD = "POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n"


async def answered(reader):
  """The status and the body of a response."""
  head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
  status = int(head.split()[1])
  if "transfer-encoding: chunked" not in head:
    size = int(head.split("content-length:")[1].split("\r\n")[0])
    return status, await reader.readexactly(size)
  body = b""
  while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
    body += await reader.readexactly(size)
    await reader.readexactly(2)
  await reader.readexactly(2)
  return status, body


async def lane(port, requests):
  """Sends requests one after the other; [status, body, seconds] of each, status 0 of one that was left."""
  results = []
  connection = None
  for request in requests:
    if connection is None:
      connection = await asyncio.open_connection("127.0.0.1", port)
    reader, writer = connection
    body = request["body"].encode()
    began = time.perf_counter()
    writer.write(HEAD.format(path=request["path"], size=len(body)).encode() + body)
    if request.get("leave") is not None:
      await asyncio.sleep(request["leave"])
      writer.transport.abort()
      connection = None
      results.append([0, "", time.perf_counter() - began])
      continue
    status, answer = await answered(reader)
    results.append([status, answer.decode(), time.perf_counter() - began])
    if status == 429:
      await asyncio.sleep(0.05)
  if connection:
    connection[1].close()
  return results


async def main(plan_path: str, result_path: str) -> None:
  with open(plan_path) as file:
    plan = json.load(file)
  began = time.perf_counter()
  results = await asyncio.gather(*(lane(plan["port"], requests) for requests in plan["lanes"]))
  with open(result_path, "w") as file:
    json.dump({"seconds": time.perf_counter() - began, "lanes": results}, file)


if __name__ == "__main__":
  asyncio.run(main(*sys.argv[1:]))
