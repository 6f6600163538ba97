//! Which of a cluster's 16,384 slots a key lies on, and names that lie all over them.

use std::sync::LazyLock;

pub(super) const SLOTS: usize = 16_384;

/// Facts and marks are kept once in each of so many equal ranges of slots. A range is 256 slots, so a master with 511 slots
/// in a row holds a copy of each, whatever was moved to it or from it since they were written.
pub(super) const COPIES: usize = 64;

/// CRC-16/XMODEM (polynomial 0x1021, from 0, most significant bit first), the one that the Redis Cluster specification names.
const CRC16: [u16; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = (byte as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 != 0 { (crc << 1) ^ 0x1021 } else { crc << 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
};

/// The slot of a key: of what stands in its first braces if there is something, else of all of it.
pub(super) fn slot(key: &[u8]) -> u16 {
    let crc = tag(key).iter().fold(0u16, |crc, byte| (crc << 8) ^ CRC16[usize::from((crc >> 8) as u8 ^ byte)]);
    crc % SLOTS as u16
}

fn tag(key: &[u8]) -> &[u8] {
    let Some(open) = key.iter().position(|byte| *byte == b'{') else { return key };
    match key[open + 1..].iter().position(|byte| *byte == b'}') {
        None | Some(0) => key,
        Some(length) => &key[open + 1..open + 1 + length],
    }
}

/// For each range of slots, in order, the least number n for which `{n}` lies in it, and its slot.
pub(super) static COPY_TAGS: LazyLock<[(u32, u16); COPIES]> = LazyLock::new(|| {
    let mut tags = [None; COPIES];
    for number in 0.. {
        let slot = slot(number.to_string().as_bytes());
        tags[usize::from(slot) * COPIES / SLOTS].get_or_insert((number, slot));
        if tags.iter().all(Option::is_some) {
            break;
        }
    }
    tags.map(|tag| tag.unwrap_or_default())
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_of_the_specification() {
        // "The output of the CRC-16 of 123456789 is 0x31C3".
        assert_eq!(slot(b"123456789"), 0x31c3);
        assert_eq!(slot(b"{user1000}.following"), slot(b"{user1000}.followers"));
        assert_eq!(slot(b"foo{}{bar}"), slot(b"foo{}{bar}"));
        assert_ne!(slot(b"foo{}{bar}"), slot(b"bar"), "empty braces are no tag");
        assert_eq!(tag(b"foo{{bar}}zap"), b"{bar");
        assert_eq!(tag(b"foo{bar}{zap}"), b"bar");
        assert_eq!(tag(b"{open"), b"{open");
        assert_eq!(tag(b""), b"");
    }

    #[test]
    fn every_range_has_a_copy() {
        for (range, (number, at)) in COPY_TAGS.iter().enumerate() {
            assert_eq!(usize::from(*at) / 256, range);
            assert_eq!(slot(format!("c1:fact:{{{number}}}name").as_bytes()), *at);
        }
        // They are part of what is stored: another choice would not find what an earlier version wrote.
        assert_eq!(COPY_TAGS[..4].iter().map(|tag| tag.0).collect::<Vec<_>>(), [10, 18, 113, 342]);
    }
}
