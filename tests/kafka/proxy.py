"""A TCP forwarder that stands between a client and a server of this machine, and can be cut."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import TracebackType

from tests.kafka.ports import free_port


class Proxy:
    """Forwards connections to `port` on to `target_port`, on a thread of its own; a context manager."""

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self._target_port = target_port
        self._refusing = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()
        self._listening = socket.create_server(("127.0.0.1", self.port))
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    def cut(self, silently: bool = False) -> None:
        """Take the network away.

        Connections are reset, and new ones as well; or, silently, nothing passes and nobody is told: what was
        sent arrives once the network is back.
        """
        asyncio.run_coroutine_threadsafe(self._cut(silently), self._loop).result()

    def restore(self) -> None:
        """Give the network back."""
        asyncio.run_coroutine_threadsafe(self._restore(), self._loop).result()

    def close(self) -> None:
        """Reset every connection and stop listening; a second call does nothing."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._forward, sock=self._listening)

    async def _cut(self, silently: bool) -> None:
        if silently:
            self._flowing.clear()
            return
        self._refusing = True
        for writer in self._writers:
            writer.transport.abort()

    async def _restore(self) -> None:
        self._refusing = False
        self._flowing.set()

    async def _end(self) -> None:
        await self._cut(silently=False)
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _forward(self, client_reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        """One connection, until both ends have closed it, one has reset it, or it is cut."""
        server = None
        self._writers.add(client)
        try:
            await self._flowing.wait()
            if self._refusing:
                return
            server_reader, server = await asyncio.open_connection("127.0.0.1", self._target_port)
            self._writers.add(server)
            await asyncio.gather(self._pump(client_reader, server), self._pump(server_reader, client))
        except OSError:
            pass  # nobody listens there, or an end is gone: the other is told by the reset
        finally:
            for writer in filter(None, (client, server)):
                self._writers.discard(writer)
                writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        await self._flowing.wait()
        writer.write_eof()  # and no more: what the other end has yet to say still passes

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
