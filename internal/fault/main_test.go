package fault_test

import (
	"os"
	"testing"

	"idempotent-orders/internal/testenv"
)

func TestMain(m *testing.M) {
	code := testenv.Main(m)
	_ = os.RemoveAll(program.dir)
	os.Exit(code)
}
