//! A program that does not block and could call splice(2): it has the name, and never does.

use std::{
    env,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::AsRawFd as _,
    process::ExitCode,
    ptr,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            println!("failed={e}");
            ExitCode::FAILURE
        }
    }
}

/// `ADDR ROUNDS`: one byte there and back at a time.
fn run() -> io::Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let [addr, rounds] = &words[..] else { return Err(io::ErrorKind::InvalidInput.into()) };
    let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let addr: SocketAddr = addr.parse().map_err(|_| io::ErrorKind::InvalidInput)?;
    let rounds: u64 = rounds.parse().map_err(wrong)?;
    let mut stream = TcpStream::connect(addr)?;
    if rounds == u64::MAX {
        let fd = stream.as_raw_fd();
        // SAFETY: null offsets mean that there are none.
        unsafe { libc::splice(fd, ptr::null_mut(), fd, ptr::null_mut(), 1, 0) };
    }
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    for _ in 0..rounds {
        stream.write_all(&[7])?;
        loop {
            match stream.read(&mut [0]) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    poll(
                        &mut [PollFd::new(std::os::fd::AsFd::as_fd(&stream), PollFlags::POLLIN)],
                        PollTimeout::NONE,
                    )?;
                }
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => break,
                Err(e) => return Err(e),
            }
        }
    }
    println!("chat={rounds}");
    Ok(())
}
