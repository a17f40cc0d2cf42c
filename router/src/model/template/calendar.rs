//! `strftime_now` of chat templates, in UTC.

use std::fmt::Write as _;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A moment as people write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Moment {
    year: i64,
    month: usize,
    day: u64,
    weekday: usize,
    second_of_day: u64,
}

impl Moment {
    /// Days to a civil date as in Howard Hinnant's `civil_from_days`.
    fn from_unix(seconds: u64) -> Self {
        let days = seconds / 86_400;
        let shifted = days + 719_468;
        let era = shifted / 146_097;
        let day_of_era = shifted % 146_097;
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        let year = year_of_era + era * 400 + u64::from(month <= 2);
        Self {
            year: i64::try_from(year).unwrap_or(i64::MAX),
            month: usize::try_from(month).unwrap_or(1),
            day,
            weekday: usize::try_from((days + 4) % 7).unwrap_or(0),
            second_of_day: seconds % 86_400,
        }
    }

    fn format(&self, format: &str) -> String {
        let mut out = String::with_capacity(format.len() + 16);
        let mut chars = format.chars();
        let (hour, minute, second) =
            (self.second_of_day / 3600, self.second_of_day / 60 % 60, self.second_of_day % 60);
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let written = match chars.next() {
                Some('Y') => write!(out, "{}", self.year),
                Some('y') => write!(out, "{:02}", self.year % 100),
                Some('m') => write!(out, "{:02}", self.month),
                Some('B') => write!(out, "{}", MONTHS[self.month - 1]),
                Some('b') => write!(out, "{}", &MONTHS[self.month - 1][..3]),
                Some('d') => write!(out, "{:02}", self.day),
                Some('e') => write!(out, "{:2}", self.day),
                Some('A') => write!(out, "{}", DAYS[self.weekday]),
                Some('a') => write!(out, "{}", &DAYS[self.weekday][..3]),
                Some('H') => write!(out, "{hour:02}"),
                Some('I') => write!(out, "{:02}", (hour + 11) % 12 + 1),
                Some('p') => write!(out, "{}", if hour < 12 { "AM" } else { "PM" }),
                Some('M') => write!(out, "{minute:02}"),
                Some('S') => write!(out, "{second:02}"),
                Some('F') => write!(out, "{}-{:02}-{:02}", self.year, self.month, self.day),
                Some('T') => write!(out, "{hour:02}:{minute:02}:{second:02}"),
                Some('Z') => write!(out, "UTC"),
                Some('%') | None => write!(out, "%"),
                Some(other) => write!(out, "%{other}"),
            };
            debug_assert!(written.is_ok(), "writing to a string cannot fail");
        }
        out
    }
}

/// Now, in the format of C's `strftime`; unknown letters are kept as they are.
pub(super) fn strftime_now(format: &str) -> String {
    Moment::from_unix(crate::clock::unix_seconds()).format(format)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days_and_years() {
        for (seconds, expected) in [
            (0, "Thu 01 Jan 1970 00:00:00 AM"),
            (951_782_400, "Tue 29 Feb 2000 00:00:00 AM"),
            (1_709_251_199, "Thu 29 Feb 2024 23:59:59 PM"),
            (1_735_689_600, "Wed 01 Jan 2025 00:00:00 AM"),
            (4_107_542_400, "Mon 01 Mar 2100 00:00:00 AM"),
        ] {
            assert_eq!(Moment::from_unix(seconds).format("%a %d %b %Y %T %p"), expected);
        }
    }

    #[test]
    fn unknown_letters_stay() {
        assert_eq!(Moment::from_unix(0).format("100%% %Q %"), "100% %Q %");
    }
}
