//! Follows websocket frames (RFC 6455, section 5.2) just closely enough to know where one ends, so that a close frame
//! can be put between two. It must not look at payloads.

/// Where in a stream of frames we are.
#[derive(Debug, Default, Clone)]
pub(crate) struct Frames {
    head: Head,
    /// Payload bytes, masking key included, still to come.
    left: u64,
    closed: bool,
}

/// The bytes of a frame's header seen so far.
#[derive(Debug, Default, Clone)]
struct Head {
    bytes: [u8; 10],
    len: usize,
}

impl Frames {
    /// Whether no frame is under way.
    pub(crate) fn at_boundary(&self) -> bool {
        self.left == 0 && self.head.len == 0
    }

    /// Whether a close frame went by; nothing may follow it.
    pub(crate) fn closed(&self) -> bool {
        self.closed && self.at_boundary()
    }

    /// Takes bytes in; with `to_boundary` it stops at the first boundary at or after the start. Says how many it took.
    pub(crate) fn take(&mut self, bytes: &[u8], to_boundary: bool) -> usize {
        let mut at = 0;
        while at < bytes.len() && !(to_boundary && self.at_boundary()) {
            if self.left > 0 {
                let step = self.left.min((bytes.len() - at) as u64);
                self.left -= step;
                // No more than the rest of the slice, so it fits.
                at += step as usize;
            } else {
                self.head.bytes[self.head.len] = bytes[at];
                self.head.len += 1;
                at += 1;
                self.begin();
            }
        }
        at
    }

    /// Turns a complete header into the number of bytes that follow it.
    fn begin(&mut self) {
        let Head { bytes, len } = &self.head;
        if *len < 2 {
            return;
        }
        let payload = match (bytes[1] & 0x7f, *len) {
            (126, 4) => u64::from(u16::from_be_bytes([bytes[2], bytes[3]])),
            (127, 10) => bytes[2..10].iter().fold(0, |n, b| n << 8 | u64::from(*b)),
            (126 | 127, _) => return,
            (short, _) => u64::from(short),
        };
        let mask = if bytes[1] & 0x80 == 0 { 0 } else { 4 };
        self.closed |= bytes[0] & 0x0f == 8;
        self.left = payload.saturating_add(mask);
        self.head.len = 0;
    }
}

/// An unmasked close frame with this code and no reason.
pub(crate) fn close_frame(code: u16) -> [u8; 4] {
    let [high, low] = code.to_be_bytes();
    [0x88, 2, high, low]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(opcode: u8, payload: usize, masked: bool, long: bool) -> Vec<u8> {
        let mask = if masked { 0x80 } else { 0 };
        let mut out = vec![0x80 | opcode];
        match payload {
            n if n > 65_535 || long => {
                out.push(127 | mask);
                out.extend((n as u64).to_be_bytes());
            }
            n if n > 125 => {
                out.push(126 | mask);
                out.extend((n as u16).to_be_bytes());
            }
            n => out.push(n as u8 | mask),
        }
        out.resize(out.len() + payload + if masked { 4 } else { 0 }, 0x88);
        out
    }

    proptest! {
        #[test]
        fn boundaries_are_found_however_the_bytes_are_cut(
            shapes in proptest::collection::vec((0u8..8, 0usize..70_000, any::<bool>(), any::<bool>()), 1..5),
            cuts in proptest::collection::vec(1usize..5000, 1..20),
        ) {
            let mut stream = Vec::new();
            let mut ends = vec![0];
            for (opcode, payload, masked, long) in shapes {
                stream.extend(frame(opcode, payload, masked, long));
                ends.push(stream.len());
            }
            let mut whole = Frames::default();
            let mut stepping = Frames::default();
            let (mut at, mut stops) = (0, vec![0]);
            for cut in cuts.iter().cycle() {
                let piece = &stream[at..stream.len().min(at + cut)];
                if piece.is_empty() {
                    break;
                }
                prop_assert_eq!(whole.take(piece, false), piece.len());
                let mut done = 0;
                while done < piece.len() {
                    // One byte leaves the boundary, the rest runs to the next.
                    if stepping.at_boundary() {
                        done += stepping.take(&piece[done..=done], false);
                    }
                    done += stepping.take(&piece[done..], true);
                    if stepping.at_boundary() {
                        stops.push(at + done);
                    }
                }
                at += piece.len();
                prop_assert_eq!(whole.at_boundary(), ends.contains(&at));
            }
            prop_assert_eq!(stops, ends);
            prop_assert!(!whole.closed());
        }

        #[test]
        fn no_bytes_make_it_panic(pieces in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..40)) {
            let mut frames = Frames::default();
            for piece in pieces {
                prop_assert_eq!(frames.take(&piece, false), piece.len());
            }
        }
    }

    #[test]
    fn a_close_frame_is_noticed_once_it_is_whole() {
        let mut frames = Frames::default();
        let close = close_frame(1000);
        frames.take(&close[..3], false);
        assert!(!frames.closed());
        frames.take(&close[3..], false);
        assert!(frames.closed());
    }
}
