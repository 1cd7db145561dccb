package connect_test

import (
	"os"
	"strings"
	"testing"

	"idempotent-orders/internal/connect"
	"idempotent-orders/internal/testenv"
)

func TestMain(m *testing.M) { os.Exit(testenv.Main(m)) }

func TestADatabaseThatCannotHoldEveryCharacterIsRefused(t *testing.T) {
	t.Parallel()
	address := testenv.DatabaseURL(t)
	pool := testenv.Pool(t, address)
	name := pool.Config().ConnConfig.Database + "_latin1"
	if _, err := pool.Exec(t.Context(), "CREATE DATABASE "+name+" TEMPLATE template0 ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C'"); err != nil {
		t.Fatal(err)
	}
	_, err := connect.PostgreSQL(t.Context(), strings.Replace(address, pool.Config().ConnConfig.Database, name, 1))
	if err == nil || !strings.Contains(err.Error(), "LATIN1") || !strings.Contains(err.Error(), "UTF8") {
		t.Errorf("got %v", err)
	}
}

func TestWhatTheUrlSaysCounts(t *testing.T) {
	t.Parallel()
	address := testenv.DatabaseURL(t)
	if n := testenv.Pool(t, address).Config().MaxConns; n != 16 {
		t.Errorf("there may be %d connections; want 16", n)
	}
	if n := testenv.Pool(t, address+"&pool_max_conns=3").Config().MaxConns; n != 3 {
		t.Errorf("there may be %d connections; want 3", n)
	}
	if _, err := connect.PostgreSQL(t.Context(), address+"&default_query_exec_mode=simple_protocol"); err == nil {
		t.Error("a mode without arrays is accepted")
	}
}
