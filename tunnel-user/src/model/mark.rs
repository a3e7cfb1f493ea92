//! Marks of sockets.

use std::{fmt, str::FromStr};

/// Bits of a socket's mark (`SO_MARK`, socket(7)): those of the mask are set to the value, the others stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    value: u32,
    mask: u32,
}

impl Mark {
    /// `None` where no bit would be set, or one outside of the mask.
    pub const fn new(value: u32, mask: u32) -> Option<Self> {
        if value == 0 || value & !mask != 0 { None } else { Some(Self { value, mask }) }
    }

    /// The bits that are set.
    pub const fn value(self) -> u32 {
        self.value
    }

    /// The bits that may be touched.
    pub const fn mask(self) -> u32 {
        self.mask
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}/{:#x}", self.value, self.mask)
    }
}

impl FromStr for Mark {
    type Err = &'static str;

    /// `VALUE[/MASK]`, each decimal or hexadecimal with 0x, as iptables and ip-rule(8) take it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| match text.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16),
            None => text.parse(),
        };
        let (value, mask) = text.split_once('/').unwrap_or((text, "0xffffffff"));
        let (Ok(value), Ok(mask)) = (number(value), number(mask)) else {
            return Err("a mark is VALUE or VALUE/MASK, each of 32 bits, like 0x1000/0x1000");
        };
        Self::new(value, mask).ok_or("the value of a mark has at least one bit, and none outside of its mask")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_a_value_and_the_bits_that_it_may_touch() {
        let mark = |text: &str| text.parse::<Mark>();
        assert_eq!(mark("0x1000/0x1000").unwrap().to_string(), "0x1000/0x1000");
        assert_eq!(mark("7").unwrap().to_string(), "0x7/0xffffffff");
        for wrong in ["", "0", "x", "0x1000/0xf", "1/0", "0x1ffffffff", "-1", "1/2/3"] {
            assert!(mark(wrong).is_err(), "{wrong}");
        }
    }
}
