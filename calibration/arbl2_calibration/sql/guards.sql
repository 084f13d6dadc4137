-- Signs that the outcomes were not read from a market, one row per venue and side.
--
-- repeats: events beyond the first that share both their visible share F0 and an outcome below 1. Where no F0 has two outcomes
-- (spread 0), there are many repeats and the outcomes are not all 0, survival is a function of its own input.

WITH share AS (
    SELECT venue, side, visible_e8::DOUBLE / size_e8 AS f0, count(*) AS n, min(y_e9) AS least_y, max(y_e9) AS most_y
    FROM fill_event
    WHERE verdict = 'fitted'
    GROUP BY ALL
)
SELECT
    venue,
    side,
    coalesce(sum(n - 1) FILTER (WHERE least_y < 1000000000), 0)::BIGINT AS repeats,
    max(most_y - least_y) AS spread,
    max(most_y) AS most_y
FROM share
GROUP BY ALL
ORDER BY ALL;
