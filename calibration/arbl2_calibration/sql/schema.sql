-- The tables that one calibration works on. Times are ns, quantities 10^-8 of the unit. Shares are kept in units of 10^-9 and
-- basis points in units of 10^-6, as integers: sums of integers are exact, so no result depends on row order, on how the rows
-- were spread over files, or on the number of threads.

CREATE OR REPLACE TABLE book (
    run_no         INTEGER NOT NULL,
    venue          VARCHAR NOT NULL,
    symbol         VARCHAR NOT NULL,
    gap_median_ns  DOUBLE              -- median time between two updates; NULL = fewer than two updates
);

CREATE OR REPLACE TABLE fill_event (
    run_no         INTEGER NOT NULL,
    session        VARCHAR NOT NULL,
    order_id       BIGINT NOT NULL,
    venue          VARCHAR NOT NULL,
    symbol         VARCHAR NOT NULL,
    side           VARCHAR NOT NULL,
    time_ns        BIGINT NOT NULL,    -- decided
    latency_ns     BIGINT NOT NULL,    -- arrival minus decision
    edge_bps       DOUBLE NOT NULL,
    size_e8        BIGINT NOT NULL,
    visible_e8     BIGINT NOT NULL,    -- x: what the order could see at its limit or better
    zone_no        INTEGER,            -- NULL = no zone holds this market state
    verdict        VARCHAR NOT NULL,   -- fitted, or why not: repeated, nothing_visible, no_zone, unresolved
    defect         VARCHAR,            -- what no honest run can contain; NULL = none
    self_test      VARCHAR,            -- latency 0 only: passed or failed
    y_e9           BIGINT,             -- survival, interpolated between the books before and after arrival
    y_lo_e9        BIGINT,             -- the smaller of the two brackets
    y_hi_e9        BIGINT,             -- the larger
    fill_e9        BIGINT,             -- visible share of the order times survival
    half_spread_e6 BIGINT,             -- bps of the decision mid: touch against mid ...
    walk_e6        BIGINT,             -- ... visible average against touch ...
    drift_e6       BIGINT              -- ... and fill average against visible average; NULL = nothing filled
);
