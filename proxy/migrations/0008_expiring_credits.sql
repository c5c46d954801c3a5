-- Credits that expire, and those of each month.

SELECT 1;
