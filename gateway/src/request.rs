//! What a caller sent, checked against the service it is for, before anything is read for it.

use arrow::array::{Array, ArrayRef, UInt32Array, new_null_array};
use arrow::compute::take;
use feature_defs::catalog::RequestTime;
use feature_defs::plan::{RequestColumn, ServicePlan, canonical};
use feature_defs::time::Micros;
use proto::v1::Column;

use crate::convert;
use crate::status::{Failure, Kind, not_known};

/// Rows in one request. A request is one read of the store and one answer in memory; more rows are several requests.
pub const ROWS_MAX: usize = 10_000;
/// Years 1 to 9999: what every client can print, and far enough from the ends of the type that no sum overflows.
const AT_MIN: Micros = -62_135_596_800_000_000;
const AT_MAX: Micros = 253_402_300_799_999_999;

/// The rows of a request, one array per column of the service.
#[derive(Debug)]
pub struct Rows {
    pub count: usize,
    pub columns: Vec<ArrayRef>,
    /// Rows with a null where the service takes none, and the first such column; ascending.
    pub incomplete: Vec<(usize, String)>,
}

impl Rows {
    /// All of the rows; columns are shared.
    pub fn picked_all(&self) -> Rows {
        Rows { count: self.count, columns: self.columns.clone(), incomplete: self.incomplete.clone() }
    }

    /// Some of the rows, in that order.
    pub fn picked(&self, rows: &[usize]) -> Result<Rows, Failure> {
        let indices: UInt32Array = rows.iter().map(|row| *row as u32).collect();
        let columns = self.columns.iter().map(|column| take(column, &indices, None));
        let columns: Result<Vec<ArrayRef>, _> = columns.collect();
        let columns =
            columns.map_err(|error| Failure::internal("rows of a request could not be taken apart", &error))?;
        let incomplete = |row: &usize| {
            let found = self.incomplete.binary_search_by_key(row, |(row, _)| *row).ok()?;
            Some(self.incomplete[found].1.clone())
        };
        let incomplete = rows.iter().enumerate().filter_map(|(place, row)| Some((place, incomplete(row)?))).collect();
        Ok(Rows { count: rows.len(), columns, incomplete })
    }
}

/// Reads the columns of a request. `at_count` says how many rows there are where the service takes no columns.
pub fn read_rows(service: &ServicePlan, sent: &[Column], at_count: usize) -> Result<Rows, Failure> {
    read_rows_beside(service, sent, at_count, |_| false)
}

/// As [`read_rows`], where the columns that `beside` names may be sent too.
pub fn read_rows_beside(
    service: &ServicePlan,
    sent: &[Column],
    at_count: usize,
    beside: impl Fn(&str) -> bool,
) -> Result<Rows, Failure> {
    let named = |name: &str| service.columns.iter().position(|column| column.name == name);
    for (index, column) in sent.iter().enumerate() {
        if named(&column.name).is_none() && !beside(&column.name) {
            let what = format!("column in what service `{}` takes:", service.name);
            let known = service.columns.iter().map(|column| column.name.as_str());
            return Err(Failure::invalid(not_known(&what, &column.name, known)));
        }
        if sent[..index].iter().any(|other| other.name == column.name) {
            return Err(Failure::invalid(format!("column `{}` is sent twice", column.name)));
        }
    }
    let count = match sent.iter().find_map(convert::rows_of) {
        Some(count) => count,
        None if at_count > 0 => at_count,
        // The service of an entity without keys answers one row to nothing.
        None if service.columns.is_empty() => 1,
        None if sent.is_empty() => return Err(absent(service, &service.columns[0])),
        None => return Err(Failure::invalid("no column carries values, so the number of rows is not known")),
    };
    if count > ROWS_MAX {
        let text = format!("{count} rows in one request, at most {ROWS_MAX} are answered; send several requests");
        return Err(Failure::invalid(text));
    }
    let mut columns = Vec::with_capacity(service.columns.len());
    for wanted in &service.columns {
        let array = match sent.iter().find(|column| column.name == wanted.name) {
            Some(column) => convert::to_array(column, &wanted.column_type, count)
                .map_err(|error| Failure::invalid(error.to_string()))?,
            None if wanted.nullable && !wanted.is_key => new_null_array(&wanted.column_type.arrow(), count),
            None => return Err(absent(service, wanted)),
        };
        // One NaN, no -0.0: a spine's columns go the same way. Their types are those wanted already.
        columns.push(canonical(array));
    }
    let mut incomplete: Vec<(usize, String)> = Vec::new();
    for (wanted, column) in service.columns.iter().zip(&columns) {
        if !wanted.nullable && column.null_count() > 0 {
            incomplete.extend((0..count).filter(|row| column.is_null(*row)).map(|row| (row, wanted.name.clone())));
        }
    }
    // Stable, so that the first column of the service stays first.
    incomplete.sort_by_key(|(row, _)| *row);
    incomplete.dedup_by_key(|(row, _)| *row);
    Ok(Rows { count, columns, incomplete })
}

fn absent(service: &ServicePlan, column: &RequestColumn) -> Failure {
    let what = if column.is_key { "entity key" } else { "request field" };
    Failure::invalid(format!(
        "service `{}` needs the {what} `{}` ({}), which the rows do not have",
        service.name, column.name, column.column_type
    ))
}

/// The time of each row, where the request says it.
pub fn read_at(at: &[Micros], rows: usize, allowed: RequestTime) -> Result<Option<Vec<Micros>>, Failure> {
    if at.is_empty() {
        return Ok(None);
    }
    if allowed == RequestTime::Refused {
        let text = "this server answers for now only: `at` is refused; start it with `serve.request_time: allowed` to \
                    replay the past";
        return Err(Failure::new(Kind::Precondition, text));
    }
    if at.len() != rows {
        return Err(Failure::invalid(format!("`at` has {} times for {rows} rows; send one per row", at.len())));
    }
    if let Some(row) = at.iter().position(|time| !(AT_MIN..=AT_MAX).contains(time)) {
        let text = format!("`at` of row {row} is {} and no time in microseconds of years 1 to 9999", at[row]);
        return Err(Failure::invalid(text));
    }
    Ok(Some(at.to_vec()))
}

/// What to say when rows are incomplete and the call has no place for an outcome per row.
pub fn refuse_incomplete(rows: &Rows) -> Result<(), Failure> {
    const LISTED_MAX: usize = 10;
    let Some((_, column)) = rows.incomplete.first() else { return Ok(()) };
    let of_column: Vec<String> =
        rows.incomplete.iter().filter(|(_, other)| other == column).map(|(row, _)| row.to_string()).collect();
    let shown = of_column[..of_column.len().min(LISTED_MAX)].join(", ");
    let more = if of_column.len() > LISTED_MAX {
        format!(" and {} more", of_column.len() - LISTED_MAX)
    } else {
        String::new()
    };
    let text = format!("request field `{column}` must not be null, but is in rows {shown}{more}");
    Err(Failure::invalid(text))
}
