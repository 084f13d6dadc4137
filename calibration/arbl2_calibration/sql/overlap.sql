-- Two runs that saw the same book at the same time: the same moments of the market would count twice.

WITH span AS (
    SELECT run_no, venue, symbol, min(time_ns) AS first_ns, max(time_ns) AS last_ns
    FROM fill_event
    GROUP BY ALL
)
SELECT DISTINCT one.run_no, other.run_no
FROM span AS one JOIN span AS other USING (venue, symbol)
WHERE one.run_no < other.run_no AND one.first_ns <= other.last_ns AND other.first_ns <= one.last_ns
ORDER BY ALL;
