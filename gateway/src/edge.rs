//! How many connections a port holds. Each costs memory and a file descriptor, whatever it asks for, and a process without
//! descriptors can open neither its store nor its log. One connection too many is closed at once: its client hears so, which
//! waiting in the backlog of the kernel would not tell it.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt};
use prometheus_client::metrics::counter::Counter;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::transport::server::{Connected, TcpConnectInfo};

/// Per port, where the system gives enough file descriptors.
const CONNECTIONS_MAX: usize = 4_096;
/// After the kernel refused to give us a connection.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// The connections that one port may hold.
#[derive(Debug, Clone)]
pub(crate) struct Limit {
    free: Arc<Semaphore>,
    max: usize,
    refused: Counter,
}

/// A connection that counts until it is closed.
#[derive(Debug)]
pub(crate) struct Limited {
    stream: TcpStream,
    _permit: OwnedSemaphorePermit,
}

impl Limit {
    /// A quarter of the file descriptors at most: two ports, and as many again for stores, logs and files.
    pub fn new(refused: Counter) -> Limit {
        let limits = std::fs::read_to_string("/proc/self/limits").ok();
        let max = limits.and_then(|limits| open_files(&limits)).map_or(CONNECTIONS_MAX, |files| files / 4);
        Limit::of(max.clamp(16, CONNECTIONS_MAX), refused)
    }

    fn of(max: usize, refused: Counter) -> Limit {
        Limit { free: Arc::new(Semaphore::new(max)), max, refused }
    }

    fn admit(&self, stream: TcpStream) -> Option<Limited> {
        match self.free.clone().try_acquire_owned() {
            Ok(permit) => Some(Limited { stream, _permit: permit }),
            Err(_) => {
                self.refused.inc();
                tracing::debug!(max = self.max, "a connection beyond the limit was closed");
                None
            }
        }
    }

    /// The connections of a stream of them that are within the limit.
    pub fn over(self, incoming: impl Stream<Item = io::Result<TcpStream>>) -> impl Stream<Item = io::Result<Limited>> {
        incoming.filter_map(move |stream| {
            let admitted = match stream {
                Ok(stream) => self.admit(stream).map(Ok),
                Err(error) => Some(Err(error)),
            };
            std::future::ready(admitted)
        })
    }
}

/// The soft limit of open files in `/proc/self/limits`; None where there is none.
fn open_files(limits: &str) -> Option<usize> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// A listener for axum that keeps the limit.
pub(crate) struct LimitedListener {
    pub listener: TcpListener,
    pub limit: Limit,
}

impl axum::serve::Listener for LimitedListener {
    type Io = Limited;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Limited, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    if let Some(limited) = self.limit.admit(stream) {
                        return (limited, address);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl Connected for Limited {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Limited {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Limited {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use axum::serve::Listener;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn one_connection_too_many_is_closed_and_counted_and_a_closed_one_makes_room() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let refused = Counter::default();
        let mut limited = LimitedListener { listener, limit: Limit::of(2, refused.clone()) };
        let accepted = tokio::spawn(async move {
            let mut held = vec![limited.accept().await.0, limited.accept().await.0];
            // Returns when one more is within the limit again.
            let gone = held.remove(0);
            let next = tokio::spawn(async move { limited.accept().await.0 });
            tokio::time::sleep(Duration::from_millis(100)).await;
            drop(gone);
            let mut next = next.await.unwrap();
            next.write_all(b"hello").await.unwrap();
            (held, next)
        });
        let _two = [TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()];
        let mut third = TcpStream::connect(address).await.unwrap();
        assert!(!matches!(third.read(&mut [0; 8]).await, Ok(1..)), "it is closed without a word");
        assert_eq!(refused.get(), 1);
        tokio::time::sleep(Duration::from_millis(150)).await;
        let mut fourth = TcpStream::connect(address).await.unwrap();
        let mut text = [0; 5];
        fourth.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"hello");
        drop(accepted.await.unwrap());
    }

    #[test]
    fn the_limit_of_open_files_is_read() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max open files            1024                 524288               files     \n";
        assert_eq!(open_files(limits), Some(1_024));
        assert_eq!(open_files("Max open files            unlimited            unlimited            files"), None);
    }
}
